"""Manifests as files and as a command prints them; revisions, canaries, and settings that contradict each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_adapter.manifest.presets import PRESETS, REVISION, config, files
from kserve_adapter.manifest.reference import reference
from kserve_adapter.manifest.render import CLUSTER_SCOPED, render, to_yaml
from runtime.cli import main
from runtime.config import Config
from runtime.config_file import parse
from runtime.errors import ConfigError
from tests.conftest import ROOT
from tests.deploy.objects import in_knative_mode, of, predictors, revision_settings
from tests.deploy.rendered import CACHE, CANARY, SETS, changed
from tests.deploy.rules.knative import FLAGS


def test_the_files_are_those_of_the_code() -> None:
    """`deploy/chart/presets` is what `make manifests` writes: there is no second source."""
    folder = ROOT / "deploy/chart/presets"
    there = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert there == files(), "run `make manifests`"


def test_the_reference_is_up_to_date() -> None:
    """`make docs` was run after the last change of a setting."""
    assert (ROOT / "docs/kubernetes.md").read_text() == reference()


def test_the_guide_has_knative_take_what_is_rendered() -> None:
    """`docs/kserve.md` turns on the feature flags that predictors need, and no others; the chart's notes name them."""
    predictor_fields = {
        field
        for objects in SETS.values()
        if in_knative_mode(objects)
        for _, predictor in predictors(objects)
        for field in predictor
    }
    assert set(FLAGS) <= predictor_fields
    guide = (ROOT / "docs/kserve.md").read_text()
    assert set(re.findall(r'"(kubernetes\.[a-z-]+)": "enabled"', guide)) == set(FLAGS.values())
    notes = (ROOT / "deploy/chart/templates/NOTES.txt").read_text()
    assert set(re.findall(r"kubernetes\.[a-z-]+", notes)) == set(FLAGS.values())


def test_canaries_in_both_ways() -> None:
    """Standard mode lists the canary, Knative takes it as the predictor; each has pools of its own."""
    standard, knative = SETS["standard-kuberay canary"], SETS["knative-kuberay canary"]
    names = [item["metadata"]["name"] for item in of(standard, "RayCluster")]
    assert names == [f"example-llm-{REVISION}", "example-llm-v2"]
    (service,) = of(standard, "InferenceService")
    assert [entry["trafficPercent"] for entry in service["spec"]["canary"]] == [10]
    (service,) = of(knative, "InferenceService")
    assert service["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert service["spec"]["predictor"]["labels"]["baton-revision"] == "v2"
    (route,) = of(SETS["route canary istio=False"], "HTTPRoute")
    weights = {ref["name"]: ref["weight"] for ref in route["spec"]["rules"][0]["backendRefs"]}
    assert weights == {"example-llm-predictor": 95, "example-llm-canary-predictor": 5}
    assert len(list(predictors(SETS["route canary istio=True"]))) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_two_services_of_one_cluster(preset: str) -> None:
    """Services of two names, or of one name in two namespaces, have no object of the whole cluster in common."""
    of_each = [
        {(item["kind"], item["metadata"]["name"]) for item in of(render(parse(data)), *CLUSTER_SCOPED)}
        for data in (
            changed(preset),
            changed(preset, name="other"),
            changed(preset, namespace="models"),
            changed(preset, namespace="others"),
        )
    ]
    assert len(set().union(*of_each)) == sum(map(len, of_each))


def test_a_runtime_for_the_whole_cluster() -> None:
    """It is there where it is asked for, and starts predictors as the namespace's own does."""
    kinds = ("ServingRuntime", "ClusterServingRuntime")
    assert [item["kind"] for item in of(SETS["standard-kuberay"], *kinds)] == ["ServingRuntime"]
    own, common = of(SETS["cpu-embedded"], *kinds)
    assert common["kind"] == "ClusterServingRuntime" and common["spec"] == own["spec"]


def test_a_revision_is_what_it_is_made_of() -> None:
    """Without a name: other weights, engine arguments or image are another revision; a front end's limits are not."""
    base = changed("standard-kuberay", revision=None)

    def name(data: dict[str, Any]) -> str:
        return str(of(render(parse(data)), "RayCluster")[0]["metadata"]["name"])

    assert re.fullmatch(r"example-llm-[0-9a-f]{8}", name(base))
    assert name({**base, "front_end": {"max_requests": 9}}) == name(base)
    others = [
        changed("standard-kuberay", revision=None, image="x:2"),
        changed("standard-kuberay", **{**CANARY, "revision": None}),
    ]
    others.append({**base, "engine_args": {**base["engine_args"], "max_model_len": 4096}})
    assert len({name(base), *(name(other) for other in others)}) == 4


@pytest.mark.parametrize(
    ("kubernetes", "says"),
    [
        ({"imag": "x"}, "did you mean `image`"),
        ({"mode": "knative", "predictor": {"autoscaler": "keda"}}, "Knative scales the predictor itself"),
        ({"predictor": {"min_replicas": 0}}, "needs mode `knative`"),
        ({"prefill": {"min_replicas": 3, "max_replicas": 2}}, "prefill.min_replicas is over"),
        ({"local_model_cache": CACHE}, "local_model_cache needs model_uri"),
        ({"name": "n" * 30, "revision": "r" * 20, "pools": "rayservice"}, "46 characters at most"),
        ({"name": "Not-A-Name"}, "kubernetes.name"),
    ],
)
def test_contradictions_are_told(kubernetes: dict[str, Any], says: str, tmp_path: Path, capsys: Any) -> None:
    """`baton manifest` says what is wrong with a cluster's settings, and prints nothing."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"kubernetes": kubernetes}))
    assert main(["manifest", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err


def pods_settings(data: dict[str, Any]) -> Config:
    """What the pods of a rendered service read."""
    ((_, made),) = revision_settings(render(parse(data)))
    return made


@pytest.mark.parametrize(
    ("section", "starts_with"),
    [
        ({"kubernetes": {"prefill": {"min_replicas": 2}}}, 2),
        ({"kubernetes": {"prefill": {"min_replicas": 0}}}, 1),
        ({"prefill": {"replicas": 3}, "kubernetes": {"prefill": {"min_replicas": 2}}}, 3),
        ({"scaling": {"prefill": {"min": None}}, "kubernetes": {"prefill": {"min_replicas": 2}}}, 2),
        ({"prefill": {"replicas": 3}, "kubernetes": {"pools": "embedded"}}, 3),
    ],
)
def test_a_pool_starts_within_the_bounds_of_its_pods(section: dict[str, Any], starts_with: int) -> None:
    """Without `replicas` it starts with the fewest that there may be, and with one where that is none."""
    assert pods_settings(section).prefill.replicas == starts_with


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"prefill": {"replicas": 4}, "kubernetes": {"prefill": {"max_replicas": 2}}}, "prefill.replicas is 4"),
        (
            {
                "engine_args": {"tensor_parallel_size": 2},
                "prefill": {"num_gpus": 2},
                "decode": {"num_gpus": 2},
                "scaling": {"budget_gpus": 2},
            },
            "budget_gpus is 2, but the smallest pools need 4",
        ),
    ],
)
def test_what_every_pod_would_refuse_is_told(section: dict[str, Any], says: str, tmp_path: Path, capsys: Any) -> None:
    """`baton manifest` refuses bounds that no pod would take, says which settings to change, and prints nothing."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(section))
    assert main(["manifest", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and "min_replicas, max_replicas" in err


def test_the_command_prints_what_is_rendered(tmp_path: Path, capsys: Any) -> None:
    """`baton manifest --config FILE`, with a canary."""
    paths = [tmp_path / name for name in ("stable.yaml", "canary.yaml")]
    paths[0].write_text(yaml.safe_dump(PRESETS["standard-keda"], sort_keys=False))
    paths[1].write_text(yaml.safe_dump(changed("standard-keda", **CANARY), sort_keys=False))
    assert main(["manifest", "--config", str(paths[0]), "--canary", str(paths[1]), "--percent", "10"]) == 0
    assert capsys.readouterr().out == to_yaml(SETS["standard-keda canary"])


def test_a_canary_with_the_same_weights() -> None:
    """Shares the cache of them, of which KServe allows one; a group of nodes can't mean two things."""
    stable = parse(changed("standard-kuberay", local_model_cache=CACHE))
    canary = parse(changed("standard-kuberay", local_model_cache=CACHE, revision="v2", image="x:2"))
    kinds = ["LocalModelNodeGroup", "LocalModelCache"]
    assert [item["kind"] for item in of(render(stable, canary, 10), *kinds)] == kinds
    other = parse(changed("standard-kuberay", local_model_cache={**CACHE, "limit": "2Ti"}, **CANARY))
    with pytest.raises(ConfigError, match="another LocalModelNodeGroup under the same name"):
        render(stable, other, 10)


def test_a_canary_that_is_none() -> None:
    """The same revision twice, or another service, is refused."""
    with pytest.raises(ConfigError, match="same revision"):
        render(config("standard-kuberay"), config("standard-kuberay"), 10)
    with pytest.raises(ConfigError, match=r"kubernetes\.name differs"):
        render(config("standard-kuberay"), parse(changed("standard-kuberay", name="other", **CANARY)), 10)
