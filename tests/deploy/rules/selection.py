"""Which pods selectors find, and which connections policies leave open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.mutation import Mutations, put
from tests.deploy.objects import Objects, Rule, of, pod_templates


def selectors_match(objects: Objects) -> Iterator[str]:
    """Every selector finds a pod, and a Deployment's finds its own alone."""
    pods = [labels for _, _, labels in pod_templates(objects)]
    for item in of(objects, "PodDisruptionBudget", "PodMonitor"):
        selector = item["spec"]["selector"]
        found = [labels for labels in pods if selects(selector, labels)]
        if not found:
            yield f"{item['kind']} {item['metadata']['name']} selects nothing"
    for item in of(objects, "NetworkPolicy"):
        if not any(selects(item["spec"]["podSelector"], labels) for labels in pods):
            yield f"NetworkPolicy {item['metadata']['name']} selects nothing"
    for item in of(objects, "Deployment"):
        if [labels for labels in pods if selects(item["spec"]["selector"], labels)] != [
            item["spec"]["template"]["metadata"]["labels"]
        ]:
            yield f"Deployment {item['metadata']['name']} does not select its own pods alone"


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches."""
    wanted = selector.get("matchLabels", {})
    listed = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(entry["key"]) in entry["values"] for entry in listed
    )


def every_pod_is_closed(objects: Objects) -> Iterator[str]:
    """A policy without rules selects every pod, both ways; what is open is open to somebody in particular."""
    policies = of(objects, "NetworkPolicy")
    closed = [
        item["spec"]["podSelector"]
        for item in policies
        if item["spec"].get("ingress") == []
        and item["spec"].get("egress") == []
        and sorted(item["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    ]
    for name, _, labels in pod_templates(objects):
        if not any(selects(selector, labels) for selector in closed):
            yield f"{name} is open"
    for item in policies:
        for rule in item["spec"].get("ingress", []):
            if not rule.get("from"):
                yield f"NetworkPolicy {item['metadata']['name']} lets everybody in"


RULES: tuple[Rule, ...] = (selectors_match, every_pod_is_closed)
MUTATIONS: Mutations = {
    "a budget for nobody": (
        "standard-kuberay",
        put("PodDisruptionBudget", "spec.selector.matchLabels.baton-part", "router"),
    ),
    "an open pod": ("standard-kuberay", put("InferenceService", "spec.predictor.labels.baton-name", "other")),
    "open to all": ("standard-kuberay", put("NetworkPolicy", "spec.ingress", [{}])),
}
