"""What Knative Serving's webhook takes of a predictor's pod, by its field masks and its validation (1.21 to 1.23)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.mutation import RUNTIME, Mutations, put
from tests.deploy.objects import PREDICTORS_OWN, Objects, Rule, in_knative_mode, pod_templates


def names(text: str) -> frozenset[str]:
    """Names of fields, written with spaces between them."""
    return frozenset(text.split())


FLAGS = {"initContainers": "kubernetes.podspec-init-containers"}
"""Fields of a pod that are rendered although Knative refuses them by default, and the flag in the ConfigMap
`config-features` that has it take them. The operator's guide turns on these flags and no others."""

POD = names("containers volumes serviceAccountName automountServiceAccountToken imagePullSecrets enableServiceLinks")
"""Fields of a pod that need no flag; a token of the API server may be turned off only."""

INIT_CONTAINER = names(
    "name image imagePullPolicy command args workingDir env envFrom ports resources securityContext volumeMounts "
    "terminationMessagePath terminationMessagePolicy"
)
CONTAINER = INIT_CONTAINER | names("livenessProbe readinessProbe startupProbe")
SECURITY = names(
    "capabilities readOnlyRootFilesystem runAsUser runAsGroup runAsNonRoot allowPrivilegeEscalation seccompProfile"
)
PORT = names("containerPort name protocol")
MOUNT = names("name mountPath subPath readOnly")
VOLUME = names("name emptyDir configMap secret projected")
VALUE_FROM = names("configMapKeyRef secretKeyRef")


def refused(pod: dict[str, Any]) -> Iterator[str]:
    """What Knative would refuse of a pod, were only `FLAGS` turned on."""
    yield from _others("the pod", pod, POD | FLAGS.keys())
    if pod.get("automountServiceAccountToken"):
        yield "the pod may not have a token"
    inits = pod.get("initContainers", [])
    if sum(len(container.get("ports", [])) for container in pod["containers"]) > 1:
        yield "there is more than one port"
    read_only = set()
    for volume in pod["volumes"]:
        yield from _others(volume["name"], volume, VOLUME)
        if "emptyDir" not in volume:
            read_only.add(volume["name"])
    mounted: set[str] = set()
    for container in [*pod["containers"], *inits]:
        yield from _others(container["name"], container, INIT_CONTAINER if container in inits else CONTAINER)
        yield from _within(container, read_only)
        mounted |= {mount["name"] for mount in container["volumeMounts"]}
    yield from (f"{volume['name']} is mounted nowhere" for volume in pod["volumes"] if volume["name"] not in mounted)


def _within(container: dict[str, Any], read_only: set[str]) -> Iterator[str]:
    name, security = container["name"], container.get("securityContext", {})
    yield from _others(f"{name}'s securityContext", security, SECURITY)
    yield from _others(f"{name}'s capabilities", security.get("capabilities", {}), names("drop"))
    for entry in container.get("env", []):
        yield from _others(f"{name}'s {entry['name']}", entry.get("valueFrom", {}), VALUE_FROM)
    for port in container.get("ports", []):
        yield from _others(f"{name}'s port", port, PORT)
    for mount in container["volumeMounts"]:
        yield from _others(f"{name}'s {mount['mountPath']}", mount, MOUNT)
        if mount["name"] in read_only and not mount.get("readOnly"):
            yield f"{name}'s {mount['mountPath']} is not mounted read-only"


def _others(what: str, part: dict[str, Any], known: frozenset[str]) -> Iterator[str]:
    yield from (f"{what} may not have `{field}`" for field in part if field not in known)


def knative_would_agree(objects: Objects) -> Iterator[str]:
    """The rules of Knative's webhook: most of a pod's fields need a feature flag that is off by default."""
    if not in_knative_mode(objects):
        return
    for name, spec, labels in pod_templates(objects):
        if labels["baton-part"] == "predictor":
            pod = {key: value for key, value in spec.items() if key not in PREDICTORS_OWN}
            yield from (f"{name}: to Knative, {problem}" for problem in refused(pod))


RULES: tuple[Rule, ...] = (knative_would_agree,)
MUTATIONS: Mutations = {
    "a pod's security, which Knative refuses": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.securityContext", {"fsGroup": 1000}),
    ),
    "constraints that Knative refuses": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.topologySpreadConstraints", []),
    ),
    "nodes that Knative lets nobody choose": (
        "knative-kuberay canary",
        put("InferenceService", "spec.predictor.nodeSelector", {"x": "y"}),
    ),
    "a runtime's field that Knative refuses": ("knative-kuberay", put("ServingRuntime", "spec.tolerations", [])),
    "a node's directory, which Knative refuses": (
        "knative embedded",
        put("InferenceService", "spec.predictor.volumes.1", {"name": "model-cache", "hostPath": {"path": "/x"}}),
    ),
    "a ConfigMap that Knative lets nobody write": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.model.volumeMounts.0.readOnly", False),
    ),
    "a volume for nobody": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.volumes.3", {"name": "idle", "emptyDir": {}}),
    ),
    "a token of the API server": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.automountServiceAccountToken", True),
    ),
    "a capability that Knative refuses": (
        "knative-kuberay",
        put("ServingRuntime", f"{RUNTIME}.securityContext.capabilities.add", ["IPC_LOCK"]),
    ),
    "a variable from the pod's fields": (
        "knative-kuberay",
        put("ServingRuntime", f"{RUNTIME}.env.0.valueFrom", {"fieldRef": {"fieldPath": "status.podIP"}}),
    ),
    "a probe of an init container": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.initContainers.0.startupProbe", {"exec": {"command": ["true"]}}),
    ),
    "a second port": ("knative-kuberay", put("ServingRuntime", f"{RUNTIME}.ports.1", {"containerPort": 8081})),
}
