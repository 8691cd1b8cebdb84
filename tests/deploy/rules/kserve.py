"""What KServe's webhooks refuse, and what its controller looks for."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.mutation import Mutations, put
from tests.deploy.objects import Objects, Rule, of, predictors


def kserves_webhooks_would_agree(objects: Objects) -> Iterator[str]:
    """The rules of KServe's validation: which canary and which autoscaler belong to which mode."""
    for item in of(objects, "InferenceService"):
        notes = item["metadata"]["annotations"]
        mode, predictor = notes["serving.kserve.io/deploymentMode"], item["spec"]["predictor"]
        scaler = notes.get("serving.kserve.io/autoscalerClass")
        canaries = item["spec"].get("canary", [])
        if mode == "Standard" and "canaryTrafficPercent" in predictor:
            yield "canaryTrafficPercent is Knative's"
        if mode == "Knative" and (canaries or scaler):
            yield "spec.canary and autoscalerClass are for Standard mode"
        names = [entry["predictor"].get("name") for entry in canaries]
        if len(set(names)) != len(names) or None in names or sum(c["trafficPercent"] for c in canaries) > 100:
            yield "canaries need names of their own and at most 100 percent"
        for entry in canaries:
            if set(entry["predictor"]) & {"maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"}:
                yield "a canary has no autoscaling of its own"
            if entry["predictor"].get("minReplicas", 1) > max(1, predictor.get("minReplicas", 1)):
                yield "a canary has no more replicas than the stable predictor"
        for metric in predictor.get("autoScaling", {}).get("metrics", []):
            if "value" not in metric["external"]["target"]:
                yield "KServe honours target.value alone"
            if scaler != "keda":
                yield "autoScaling needs autoscalerClass keda"


def runtimes_are_found(objects: Objects) -> Iterator[str]:
    """A predictor's runtime is there and takes its format."""
    runtimes = {item["metadata"]["name"]: item["spec"] for item in of(objects, "ServingRuntime")}
    for name, predictor in predictors(objects):
        runtime = runtimes.get(predictor["model"]["runtime"])
        formats = [entry["name"] for entry in (runtime or {}).get("supportedModelFormats", [])]
        if predictor["model"]["modelFormat"]["name"] not in formats:
            yield f"{name}: its runtime is not there or does not take its format"


def models_are_cached(objects: Objects) -> Iterator[str]:
    """A `storageUri` has one cache, which KServe's webhook allows it, on a group of nodes that is there once."""
    groups = [item["metadata"]["name"] for item in of(objects, "LocalModelNodeGroup")]
    caches = [item["spec"] for item in of(objects, "LocalModelCache")]
    for name, predictor in predictors(objects):
        uri = predictor["model"].get("storageUri")
        found = [cache for cache in caches if cache["sourceModelUri"] == uri]
        if uri and len(found) != 1:
            yield f"{name}: {len(found)} caches of {uri}"
        yield from (
            f"{name}: no group {group}" for cache in found for group in cache["nodeGroups"] if group not in groups
        )
    if len(groups) != len(set(groups)):
        yield "a group of nodes is there twice"


RULES: tuple[Rule, ...] = (kserves_webhooks_would_agree, runtimes_are_found, models_are_cached)
MUTATIONS: Mutations = {
    "Knative's canary in Standard": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.canaryTrafficPercent", 9),
    ),
    "a canary that scales": (
        "standard-kuberay canary",
        put("InferenceService", "spec.canary.0.predictor.maxReplicas", 3),
    ),
    "averageValue": (
        "standard-keda",
        put("InferenceService", "spec.predictor.autoScaling.metrics.0.external.target", {"averageValue": "5"}),
    ),
    "weights that nothing caches": (
        "local model cache canary",
        put("InferenceService", "spec.canary.0.predictor.model.storageUri", "s3://example-bucket/v3"),
    ),
    "no such nodes": ("local model cache", put("LocalModelNodeGroup", "metadata.name", "cpu")),
    "another format": ("standard-kuberay", put("InferenceService", "spec.predictor.model.modelFormat.name", "onnx")),
}
