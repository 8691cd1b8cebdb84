"""What scales on which metric."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kserve_adapter.manifest.guards import CARRIED
from kserve_adapter.manifest.pools import DESIRED, QUEUE
from kserve_adapter.manifest.serving import RUNNING
from tests.deploy.mutation import Mutations, put
from tests.deploy.objects import Objects, Rule, of, pod_templates, predictors

KNOWN_METRICS = {DESIRED, QUEUE, RUNNING}


def queries_name_what_exists(objects: Objects) -> Iterator[str]:
    """Metrics are ones that the code exports, labels ones that Prometheus carries over."""
    carried = {label.replace("-", "_") for label in CARRIED}
    for item in of(objects, "PodMonitor"):
        if item["spec"].get("podTargetLabels") != list(CARRIED):
            yield f"PodMonitor {item['metadata']['name']} does not carry {CARRIED} over"
        if item["spec"].get("scrapeProtocols") != ["PrometheusText0.0.4"]:
            yield f"PodMonitor {item['metadata']['name']} takes a format that changes vLLM's names"
    names = {labels["baton-name"] for _, _, labels in pod_templates(objects)}
    for query in queries(objects):
        (metric,) = re.findall(r"([a-z_:]+)\{", query)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', query))
        if query.startswith("sum(") and not query.startswith("sum(max by"):
            yield f"{query}: adds up what every front end tells"
        if metric not in KNOWN_METRICS:
            yield f"{query}: there is no metric {metric}"
        if unknown := set(labels) - carried - {"pool"}:
            yield f"{query}: no series has {unknown}"
        if labels.get("baton_name") not in names:
            yield f"{query}: asks for another service"


def queries(objects: Objects) -> Iterator[str]:
    """Every PromQL query of an autoscaler."""
    for item in of(objects, "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])
    for _, predictor in predictors(objects):
        for metric in predictor.get("autoScaling", {}).get("metrics", []):
            yield metric["external"]["metric"]["query"]


def scalers_have_targets(objects: Objects) -> Iterator[str]:
    """KEDA's targets exist and have `/scale`, which Ray's kinds have not; nothing else sets their replicas."""
    deployments = {item["metadata"]["name"]: item for item in of(objects, "Deployment")}
    for item in of(objects, "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        if target["kind"] != "Deployment" or target["name"] not in deployments:
            yield f"ScaledObject {item['metadata']['name']} has no target"
        elif "replicas" in deployments[target["name"]]["spec"]:
            yield f"Deployment {target['name']} fixes the replicas that KEDA sets"
        if item["spec"]["minReplicaCount"] > item["spec"]["maxReplicaCount"]:
            yield f"ScaledObject {item['metadata']['name']}: bounds"


def wanted_replicas_are_taken_exactly(objects: Objects) -> Iterator[str]:
    """Where Baton says how many pods there are to be, Kubernetes tolerates none more or less."""
    for item in of(objects, "ScaledObject"):
        behavior = item["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
        if not any(DESIRED in trigger["metadata"]["query"] for trigger in item["spec"]["triggers"]):
            continue
        for way in ("scaleUp", "scaleDown"):
            if behavior.get(way, {}).get("tolerance") != "0":
                yield f"ScaledObject {item['metadata']['name']}: {way} tolerates another number than the one wanted"


RULES: tuple[Rule, ...] = (queries_name_what_exists, scalers_have_targets, wanted_replicas_are_taken_exactly)
MUTATIONS: Mutations = {
    "a metric that is not": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'max(baton_queue{baton_name="example-llm"})'),
    ),
    "a label that is not": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'max(baton_pool_queue_depth{app="example-llm"})'),
    ),
    "each front end's sum": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'sum(baton_pool_queue_depth{baton_name="example-llm"})'),
    ),
    "labels not carried": ("standard-keda", put("PodMonitor", "spec.podTargetLabels", [])),
    "a format that renames": ("standard-keda", put("PodMonitor", "spec.scrapeProtocols", None)),
    "KEDA on a RayCluster": ("standard-keda", put("ScaledObject", "spec.scaleTargetRef.kind", "RayCluster")),
    "a tenth more or less": ("desired", put("ScaledObject", "spec.advanced", None)),
    "fixed replicas": ("standard-keda", put("Deployment", "spec.replicas", 1)),
}
