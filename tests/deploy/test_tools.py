"""The chart by Helm and the overlays by kubectl, where these are to be had; the Dockerfile by its text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_adapter.manifest.presets import PRESETS, config
from kserve_adapter.manifest.render import render
from tests.conftest import ROOT
from tests.deploy.objects import of, pod_templates
from tests.deploy.rules import broken
from tests.deploy.schemas import is_custom, needs_crds, problems

CHART = ROOT / "deploy/chart"
NEW = {"name": "my-llm", "image": "registry.example.org/baton:9", "modelUri": "hf://me/model:abc"}


def tool(name: str) -> str:
    """A tool's path; skips where it is not to be had."""
    found = shutil.which(name) or os.environ.get(f"BATON_{name.upper()}")
    if not found:
        pytest.skip(f"no {name}: install it, or name it with BATON_{name.upper()}")
    return found


def run(*command: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def helm(preset: str, *options: str, **given: str) -> list[dict[str, Any]]:
    """The chart's objects."""
    values = [f"--set-string={key}={value}" for key, value in {**NEW, "preset": preset, **given}.items()]
    text = run(tool("helm"), "template", "release", str(CHART), *values, *options)
    return [item for item in yaml.safe_load_all(text) if item]


def check(objects: list[dict[str, Any]]) -> None:
    """Kubernetes' own kinds by schema, all by rule."""
    assert not [problem for item in objects if not is_custom(item) for problem in problems(item)]
    assert not broken(objects)


def check_custom_kinds(objects: list[dict[str, Any]]) -> None:
    """The others by the projects' CRDs."""
    checked = [item for item in objects if is_custom(item)]
    assert len(checked) > 3
    assert not [problem for item in checked for problem in problems(item)]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_chart(preset: str) -> None:
    """Lint finds nothing; every object of the preset is there under the new name, valid, with the new image."""
    run(tool("helm"), "lint", "--strict", str(CHART), f"--set=preset={preset}")
    objects = helm(preset)
    check(objects)
    kinds = sorted(item["kind"] for item in render(config(preset)))
    assert sorted(item["kind"] for item in objects) == kinds
    text = yaml.safe_dump_all(objects)
    assert "example-" not in text and all(value in text for value in NEW.values())


def revision(objects: list[dict[str, Any]]) -> str:
    """The one revision that a chart's objects are of."""
    check(objects)
    (name,) = {labels["baton-revision"] for _, _, labels in pod_templates(objects)}
    return name


@pytest.mark.parametrize("preset", PRESETS)
def test_other_weights_are_another_revision(preset: str) -> None:
    """With pools of its own: by default other weights or another image get another name, the same ones the same."""
    names = [revision(helm(preset)), revision(helm(preset, name="other"))]
    assert names[0] == names[1] and re.fullmatch(r"[0-9a-f]{8}", names[0])
    names += [revision(helm(preset, modelUri="hf://me/model:def")), revision(helm(preset, image="x:2"))]
    assert len(set(names)) == 3


@pytest.mark.parametrize("given", ["v2", "20261128", "1e6", "example-llm", "true"])
def test_a_revision_that_is_given(given: str) -> None:
    """It is called so, also where YAML would read a number or the preset has a word like it."""
    assert revision(helm("standard-kuberay", revision=given)) == given


def test_a_revision_too_long() -> None:
    """What KubeRay would refuse is refused."""
    long = [f"--set=name={'n' * 30}", f"--set=revision={'r' * 18}", "--set=preset=standard-rayservice"]
    done = subprocess.run(
        [tool("helm"), "template", "x", str(CHART), *long], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "46 characters at most" in done.stderr


def test_the_charts_values_are_taken_as_they_are() -> None:
    """Also where they hold the words that stand for other values in a preset, or what YAML would read otherwise."""
    uri, image = "s3://bucket/example-llm/example-v1: #1", "example-registry/baton:0.1.0-example-llm"
    objects = helm("standard-kuberay", modelUri=uri, image=image, name="an-example-v1", revision="example-llm")
    assert revision(objects) == "example-llm"
    assert {item["metadata"]["name"] for item in of(objects, "InferenceService")} == {"an-example-v1"}
    for _, spec, _ in pod_templates(objects):
        assert {container["image"] for container in spec["containers"]} == {image}
        assert all(init["command"][2] == uri for init in spec.get("initContainers", []))


@needs_crds
@pytest.mark.parametrize("preset", PRESETS)
def test_the_charts_custom_kinds(preset: str) -> None:
    """As above, by the projects' own CRDs."""
    check_custom_kinds(helm(preset))


def test_the_charts_patches() -> None:
    """A value of `patches` is merged over the objects of its kind, and over no others."""
    objects = helm("standard-keda", "--set=patches.PodDisruptionBudget.spec.maxUnavailable=2")
    assert {item["spec"]["maxUnavailable"] for item in of(objects, "PodDisruptionBudget")} == {2}
    check(objects)
    others = [
        [item for item in made if item["kind"] != "PodDisruptionBudget"] for made in (objects, helm("standard-keda"))
    ]
    assert others[0] == others[1]


@pytest.mark.parametrize("value", ["preset=other", "name=Not-A-Name", "modelUrl=x"])
def test_the_chart_refuses_wrong_values(value: str) -> None:
    """An unknown preset, a name that is none, a misspelt value."""
    done = subprocess.run(
        [tool("helm"), "template", "x", str(CHART), f"--set={value}"], capture_output=True, timeout=60
    )
    assert done.returncode != 0


def overlay(preset: str, deploy: Path = ROOT / "deploy") -> list[dict[str, Any]]:
    """An overlay's objects."""
    text = run(tool("kubectl"), "kustomize", str(deploy / "kustomize" / preset))
    return [item for item in yaml.safe_load_all(text) if item]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_overlays(preset: str) -> None:
    """Each overlay builds, in its namespace, and is valid."""
    objects = overlay(preset)
    check(objects)
    assert {item["metadata"].get("namespace") for item in of(objects, "ConfigMap", "InferenceService")} == {"models"}


@pytest.mark.parametrize("preset", PRESETS)
def test_an_overlay_by_the_guide(preset: str, tmp_path: Path) -> None:
    """What `docs/kserve.md` has `sed` do leaves none of the preset's own words but the image."""
    expressions = re.findall(r"-e '([^']+)'", (ROOT / "docs/kserve.md").read_text())
    assert len(expressions) == 3
    path = tmp_path / "objects.yaml"
    path.write_text(run(tool("kubectl"), "kustomize", str(ROOT / "deploy/kustomize" / preset)))
    text = run("sed", *(f"--expression={expression}" for expression in expressions), str(path))
    assert revision([item for item in yaml.safe_load_all(text) if item]) == "v1"
    assert not re.search("example-(?!registry)", text)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_overlays_image(preset: str, tmp_path: Path) -> None:
    """The image is changed in one place of an overlay, and is then every container's."""
    for part in (f"kustomize/{preset}", f"chart/presets/{preset}"):
        shutil.copytree(ROOT / "deploy" / part, tmp_path / part)
    path = tmp_path / f"kustomize/{preset}/kustomization.yaml"
    path.write_text(path.read_text().replace("newTag: 0.1.0", "newTag: 9"))
    objects = overlay(preset, tmp_path)
    check(objects)
    text = yaml.safe_dump_all(objects)
    assert "example-registry/baton:9" in text and "example-registry/baton:0.1.0" not in text


@needs_crds
@pytest.mark.parametrize("preset", PRESETS)
def test_the_overlays_custom_kinds(preset: str) -> None:
    """As above, by the projects' own CRDs."""
    check_custom_kinds(overlay(preset))


def test_every_preset_has_an_overlay() -> None:
    """None more, none less."""
    assert {path.parent.name for path in ROOT.glob("deploy/kustomize/*/kustomization.yaml")} == set(PRESETS)


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"FROM \S+ AS (\w+)", line):
            found[match[1]] = []
        elif found and line.strip() and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


PACKAGES = {"runtime", "prefill", "decode", "kv_transfer", "kserve_adapter"}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_images(target: str) -> None:
    """Both targets get all five packages, are told nothing twice, and end as the user that the manifests run."""
    lines = stages()[target]
    assert [line for line in lines if line.startswith("COPY --from=")] == ["COPY --from=source / ./"]
    assert {Path(path).name for path in copied(stages()["source"])} >= PACKAGES
    assert not set(copied(stages()["source"])) & set(copied(lines))
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert "--uid 1000" in " ".join(stages()["base"])


def copied(lines: list[str]) -> list[str]:
    """What a stage copies from the checkout."""
    return [word for line in lines if re.match(r"COPY (?!--from)", line) for word in line.split()[1:-1]]


def test_what_the_images_copy_is_sent_to_the_builder() -> None:
    """It exists, and the list of what is left out leaves it in."""
    paths = [path for lines in stages().values() for path in copied(lines)]
    assert all((ROOT / path).exists() for path in paths)
    sent = re.findall(r"^!(\S+)$", (ROOT / "deploy/Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert {path.split("/")[0] for path in paths} == set(sent)
