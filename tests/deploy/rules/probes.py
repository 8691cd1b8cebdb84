"""What the kubelet asks pods, and whether the answer is true."""

from __future__ import annotations

from collections.abc import Iterator

from kserve_adapter.manifest.pods import RAY_AGENT_PORT
from tests.deploy.mutation import RUNTIME, Mutations, put
from tests.deploy.objects import Objects, Rule, of, pod_templates

READY = "/v2/health/ready"
"""Ready only when the model is, unlike KServe's own (`TruthfulDataPlane`)."""


def probes_tell_the_truth(objects: Objects) -> Iterator[str]:
    """Ready is asked where Baton's server says whether it can serve, by no name; alive never depends on that."""
    for item in of(objects, "ServingRuntime", "ClusterServingRuntime"):
        (container,) = item["spec"]["containers"]
        if container["name"] != "kserve-container":
            yield f"{item['kind']}: the container is not called kserve-container"
        if container["readinessProbe"]["httpGet"]["path"] != READY:
            yield f"{item['kind']}: readiness is not asked at {READY}"
        for probe in ("livenessProbe", "startupProbe"):
            if container[probe]["httpGet"]["path"] != "/v2/health/live":
                yield f"{item['kind']}: {probe} depends on the model"
        ports = [port["containerPort"] for port in container["ports"]]
        served = [int(arg.split("=")[1]) for arg in container["args"] if arg.startswith("--http_port=")]
        if ports != served or container["readinessProbe"]["httpGet"]["port"] not in ports:
            yield f"{item['kind']}: probe, port and argument disagree"


def ray_nodes_tell_their_health(objects: Objects) -> Iterator[str]:
    """Every Ray node is asked itself, a RayService's workers too: KubeRay would ask them for a proxy."""
    for name, spec, labels in pod_templates(objects):
        if labels["baton-part"] == "predictor":
            continue
        for probe in ("readinessProbe", "livenessProbe"):
            asked = spec["containers"][0].get(probe, {}).get("httpGet")
            if asked != {"path": "/api/healthz", "port": RAY_AGENT_PORT}:
                yield f"{name}: its {probe} does not ask Ray's agent"


RULES: tuple[Rule, ...] = (probes_tell_the_truth, ray_nodes_tell_their_health)
MUTATIONS: Mutations = {
    "a probe that lies": (
        "standard-kuberay",
        put("ServingRuntime", f"{RUNTIME}.readinessProbe.httpGet.path", "/v2/health/live"),
    ),
    "a probe that asks a canary for another model": (
        "route canary istio=False",
        put("ServingRuntime", f"{RUNTIME}.readinessProbe.httpGet.path", "/v2/models/{{.Name}}/ready"),
    ),
    "a probe that kills": (
        "standard-kuberay",
        put("ServingRuntime", f"{RUNTIME}.livenessProbe.httpGet.path", "/v2/models/{{.Name}}/ready"),
    ),
    "a worker without a probe": (
        "standard-rayservice",
        put("RayService", "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.readinessProbe", None),
    ),
    "a head that is asked elsewhere": (
        "standard-kuberay",
        put("RayCluster", "spec.headGroupSpec.template.spec.containers.0.livenessProbe.httpGet.port", 8265),
    ),
    "a Deployment without a probe": (
        "standard-keda",
        put("Deployment", "spec.template.spec.containers.0.livenessProbe", None),
    ),
    "another port": ("standard-kuberay", put("ServingRuntime", f"{RUNTIME}.ports.0.containerPort", 9000)),
    "another container": ("standard-kuberay", put("ServingRuntime", f"{RUNTIME}.name", "server")),
}
