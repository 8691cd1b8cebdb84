"""What keeps the pods safe and seen: network policies, disruption budgets, monitors, the service account."""

from __future__ import annotations

from typing import Any

from kserve_adapter.manifest.pods import DASHBOARD_PORT, GRPC_PORT, HTTP_PORT, RAY_METRICS_PORT, Object
from kserve_adapter.manifest.settings import KubernetesSettings

PARTS = ("predictor", "head", "prefill", "decode")
KNATIVE_PORTS = (8012, 8013, 8022, 9090, 9091)
"""queue-proxy: requests, their HTTP/2 twin, administration, and its metrics, which Knative's autoscaler reads."""

CARRIED = ("baton-name", "baton-revision")
"""Pod labels that Prometheus carries over to every series; `-` becomes `_` there."""


def service_account(settings: KubernetesSettings) -> Object:
    """The account of all pods but a head with an autoscaler, which has KubeRay's. It may do nothing."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": settings.name, "labels": {"baton-name": settings.name}},
        "automountServiceAccountToken": False,
    }


def network_policies(settings: KubernetesSettings) -> list[Object]:
    """Close everything but: gateway to predictor, pods of this service among themselves, monitoring, DNS, the store."""
    network = settings.network
    mine: Object = {"podSelector": {"matchLabels": {"baton-name": settings.name}}}
    predictor_ports = [HTTP_PORT, GRPC_PORT]
    sources = [_namespace(network.gateway_namespace)]
    if settings.mode == "knative":
        predictor_ports += KNATIVE_PORTS
        sources.append(_namespace("knative-serving"))
    dns = {"to": [_namespace("kube-system")], "ports": [{"protocol": p, "port": 53} for p in ("UDP", "TCP")]}
    store = {"to": [{"ipBlock": {"cidr": network.store_cidr}}], "ports": _ports([443])}
    policies = [
        _policy(settings, "closed", {}, ingress=[], egress=[]),
        _policy(settings, "open", {}, egress=[dns, store]),
        _policy(
            settings,
            "predictor",
            {"baton-part": "predictor"},
            ingress=[{"from": sources, "ports": _ports(predictor_ports)}],
        ),
        _policy(
            settings,
            "monitoring",
            {},
            ingress=[
                {
                    "from": [_namespace(network.monitoring_namespace)],
                    "ports": _ports([HTTP_PORT, RAY_METRICS_PORT]),
                }
            ],
        ),
    ]
    if settings.pools != "embedded":
        # Ray and UCX choose ports as they go: between pods of this service all are open, to everybody else none.
        policies.append(_policy(settings, "pools", {}, ingress=[{"from": [mine]}], egress=[{"to": [mine]}]))
        operator = {"from": [_namespace(network.operator_namespace)], "ports": _ports([DASHBOARD_PORT])}
        # The autoscaler beside the head asks the API server for pods; where that is, is not known here.
        api = {"ports": _ports([443, 6443])}
        policies.append(_policy(settings, "head", {"baton-part": "head"}, ingress=[operator], egress=[api]))
    return policies


def _policy(settings: KubernetesSettings, name: str, part: dict[str, str], **rules: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{settings.name}-{name}", "labels": {"baton-name": settings.name}},
        "spec": {
            "podSelector": {"matchLabels": {"baton-name": settings.name, **part}},
            "policyTypes": [way.capitalize() for way in rules],
            **rules,
        },
    }


def _namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _ports(numbers: Any) -> list[Object]:
    return [{"protocol": "TCP", "port": number} for number in numbers]


def disruption_budgets(settings: KubernetesSettings) -> list[Object]:
    """One pod of a part at a time may be taken by maintenance."""
    parts = ("predictor",) if settings.pools == "embedded" else PARTS
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{settings.name}-{part}", "labels": {"baton-name": settings.name}},
            "spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": {"baton-name": settings.name, "baton-part": part}},
            },
        }
        for part in parts
    ]


def monitors(settings: KubernetesSettings) -> list[Object]:
    """What Prometheus scrapes: the front ends (vLLM's, KServe's and Baton's metrics) and every Ray node."""
    endpoints = {
        "predictor": {"portNumber": HTTP_PORT, "path": "/metrics", "interval": "15s"},
        "ray": {"portNumber": RAY_METRICS_PORT, "path": "/metrics", "interval": "15s"},
    }
    made = []
    for name, endpoint in endpoints.items():
        parts = ["predictor"] if name == "predictor" else [part for part in PARTS if part != "predictor"]
        if name == "ray" and settings.pools == "embedded":
            continue
        selector = {
            "matchLabels": {"baton-name": settings.name},
            "matchExpressions": [{"key": "baton-part", "operator": "In", "values": parts}],
        }
        made.append(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PodMonitor",
                "metadata": {"name": f"{settings.name}-{name}", "labels": {"baton-name": settings.name}},
                "spec": {
                    "selector": selector,
                    "podTargetLabels": list(CARRIED),
                    # In the OpenMetrics format the colon of vLLM's names becomes `_`, and queries miss them.
                    "scrapeProtocols": ["PrometheusText0.0.4"],
                    "podMetricsEndpoints": [endpoint],
                },
            }
        )
    return made
