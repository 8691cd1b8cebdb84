"""What belongs to a revision: its settings, its cluster, its pools' hardware, its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from runtime.config_file import parse
from runtime.errors import ConfigError
from tests.deploy.mutation import POD, WORKERS, Mutations, put
from tests.deploy.objects import Objects, Rule, of, pod_templates, predictors, revision_settings


def settings_are_batons(objects: Objects) -> Iterator[str]:
    """The settings that pods read are valid, and those of the predictor's own revision and pools."""
    maps = {item["metadata"]["name"]: item["data"]["settings.yaml"] for item in of(objects, "ConfigMap")}
    for name, spec, labels in pod_templates(objects):
        for volume in spec["volumes"]:
            if "configMap" not in volume:
                continue
            text = maps.get(volume["configMap"]["name"])
            if text is None:
                yield f"{name} mounts settings that are not there"
                continue
            try:
                config = parse(yaml.safe_load(text), name)
            except ConfigError as error:
                yield f"{name}: {error}"
                continue
            if config.name != f"{labels['baton-name']}-{labels['baton-revision']}":
                yield f"{name} reads another revision's settings"


def revisions_stay_apart(objects: Objects) -> Iterator[str]:
    """A predictor joins the Ray cluster of its own revision."""
    clusters = {item["metadata"]["name"] for item in of(objects, "RayCluster", "RayService")}
    for name, spec, labels in pod_templates(objects):
        own = f"{labels['baton-name']}-{labels['baton-revision']}"
        for container in spec["containers"]:
            words = [*container.get("command", []), *(entry.get("value", "") for entry in container.get("env", []))]
            for address in re.findall(r"([a-z0-9-]+)-head-svc:6379", " ".join(words)):
                if address != own or address not in clusters:
                    yield f"{name} joins {address}, which is not its revision's cluster"


def pods_of_a_revision_are_alike(objects: Objects) -> Iterator[str]:
    """They run one image, which Ray asks of its nodes; a predictor has the keys that its settings ask for."""
    images: dict[str, str] = {}
    keys = {revision: config.front_end.api_keys_env for revision, config in revision_settings(objects)}
    for name, spec, labels in pod_templates(objects):
        revision = labels["baton-revision"]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            if images.setdefault(revision, container["image"]) != container["image"]:
                yield f"{name} runs {container['image']}, other pods of its revision {images[revision]}"
        given = {entry["name"] for entry in spec["containers"][0]["env"]}
        if labels["baton-part"] == "predictor" and not {keys.get(revision)} - {None} <= given:
            yield f"{name} has not the API keys that its settings ask for"
    for name, predictor in predictors(objects):
        if missing := {"image", "resources"} - set(predictor["model"]):
            yield f"{name} leaves {sorted(missing)} to a runtime that other revisions share"


def pools_get_their_hardware(objects: Objects) -> Iterator[str]:
    """A pool's nodes carry the label that its workers ask for, and GPUs enough for one."""
    (first, *_) = of(objects, "ConfigMap")
    try:
        config = parse(yaml.safe_load(first["data"]["settings.yaml"]))
    except ConfigError:
        return  # another rule says so
    for item in of(objects, "RayCluster", "RayService"):
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in spec["workerGroupSpecs"]:
            pool = config.pool(group["groupName"])
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            if group["labels"] != pool.label_selector:
                yield f"no worker asks for the label of {group['groupName']}"
            if int(limits.get("nvidia.com/gpu", 0)) * pool.nodes != pool.num_gpus:
                yield f"{group['groupName']} has other GPUs than its worker needs"
    for item in of(objects, "Deployment"):
        labels = item["spec"]["template"]["metadata"]["labels"]
        pool = config.pool(labels["baton-part"])
        (container,) = item["spec"]["template"]["spec"]["containers"]
        wanted = ",".join(f"{key}={value}" for key, value in pool.label_selector.items())
        if (
            f"--labels={wanted}" not in container["command"]
            or f"--num-gpus={pool.num_gpus}" not in container["command"]
        ):
            yield f"{item['metadata']['name']} offers not what its worker asks for"


def weights_are_the_pinned_ones(objects: Objects) -> Iterator[str]:
    """Front ends and engines read the same model, from the path that they are told."""
    uris = set()
    for name, spec, labels in pod_templates(objects):
        for init in spec.get("initContainers", []):
            uris.add((labels["baton-revision"], init["command"][2]))
            if init["command"][init["command"].index("--link") + 1] != "/mnt/models":
                yield f"{name}: the model is not where it is looked for"
    if len(uris) != len({revision for revision, _ in uris}):
        yield f"pods of one revision fetch different weights: {sorted(uris)}"


RULES: tuple[Rule, ...] = (
    settings_are_batons,
    revisions_stay_apart,
    pods_of_a_revision_are_alike,
    pools_get_their_hardware,
    weights_are_the_pinned_ones,
)
MUTATIONS: Mutations = {
    "a canary on the stable image": (
        "a canary of another image",
        put("InferenceService", "spec.canary.0.predictor.model.image", "example-registry/baton:0.1.0"),
    ),
    "a canary without its keys": (
        "a canary of another image",
        put("InferenceService", "spec.canary.0.predictor.model.env.0.name", "OTHER"),
    ),
    "an image left to the runtime": ("standard-kuberay", put("InferenceService", "spec.predictor.model.image", None)),
    "resources left to the runtime": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.model.resources", None),
    ),
    "another cluster": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.model.env.0.value", "x-head-svc:6379"),
    ),
    "a GPU too few": (
        "standard-kuberay",
        put("RayCluster", f"{POD}.containers.0.resources.limits", {"nvidia.com/gpu": "1", "memory": "1Gi"}),
    ),
    "another label": ("standard-kuberay", put("RayCluster", f"{WORKERS}.labels.pool", "x")),
    "invalid settings": ("standard-kuberay", put("ConfigMap", "data", {"settings.yaml": "modle: x"})),
    "other weights": ("standard-kuberay", put("RayCluster", f"{POD}.initContainers.0.command.2", "s3://m/v0")),
    "a model elsewhere": ("standard-kuberay", put("RayCluster", f"{POD}.initContainers.0.command.6", "/models")),
}
