"""The objects of a set as rules look at them: the pods that will run, the predictors, the revisions' settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from runtime.config import Config
from runtime.config_file import parse
from runtime.errors import ConfigError

Objects = list[dict[str, Any]]
Rule = Callable[[Objects], Iterator[str]]
RUNTIMES_OWN = {"supportedModelFormats", "protocolVersions", "multiModel", "containers"}
OVERRIDES = ("image", "resources")
"""Fields of a predictor's model that KServe takes in place of its runtime's; lists are put together."""

PREDICTORS_OWN = {"name", "labels", "annotations", "model", "timeout", "canaryTrafficPercent"}
PREDICTORS_OWN |= {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling"}
"""Fields of a ServingRuntime (above) and of a predictor that are KServe's; all others are the pod's."""


def of(objects: Objects, *kinds: str) -> Objects:
    """The objects of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pod_templates(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Every pod that will run: a name for it, its spec, its labels. A predictor's is put together as KServe does."""
    for item in of(objects, "RayCluster", "RayService"):
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = group["template"]
            yield f"{item['kind']}/{group.get('groupName', 'head')}", template["spec"], template["metadata"]["labels"]
    for item in of(objects, "Deployment"):
        template = item["spec"]["template"]
        yield f"Deployment/{item['metadata']['name']}", template["spec"], template["metadata"]["labels"]
    runtimes = {item["metadata"]["name"]: item["spec"] for item in of(objects, "ServingRuntime")}
    for name, predictor in predictors(objects):
        model = predictor["model"]
        runtime = runtimes[model["runtime"]]
        container = {**runtime["containers"][0], **{key: model[key] for key in OVERRIDES if key in model}}
        for key in ("args", "volumeMounts"):
            container[key] = [*container.get(key, []), *model.get(key, [])]
        env = {entry["name"]: entry for entry in [*container["env"], *model.get("env", [])]}
        container["env"] = list(env.values())
        common = {key: value for key, value in runtime.items() if key not in RUNTIMES_OWN}
        spec = {**common, **predictor, "containers": [container]}
        spec["volumes"] = [*runtime["volumes"], *predictor.get("volumes", [])]
        yield f"InferenceService/{name}", spec, predictor["labels"]


def predictors(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every predictor, canaries included."""
    for item in of(objects, "InferenceService"):
        yield item["metadata"]["name"], item["spec"]["predictor"]
        for canary in item["spec"].get("canary", []):
            yield f"{item['metadata']['name']}/{canary['predictor']['name']}", canary["predictor"]


def in_knative_mode(objects: Objects) -> bool:
    """Whether the predictors are Knative's."""
    notes = [item["metadata"]["annotations"] for item in of(objects, "InferenceService")]
    return any(note["serving.kserve.io/deploymentMode"] == "Knative" for note in notes)


def revision_settings(objects: Objects) -> Iterator[tuple[str, Config]]:
    """The settings of each revision, where they are valid."""
    for item in of(objects, "ConfigMap"):
        with contextlib.suppress(ConfigError):
            yield item["metadata"]["labels"]["baton-revision"], parse(yaml.safe_load(item["data"]["settings.yaml"]))
