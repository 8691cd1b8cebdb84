"""Pods: what every container of Baton's has in common, and how a model gets into one."""

from __future__ import annotations

import math
from typing import Any

from kserve_adapter.manifest.settings import KubernetesSettings, PoolPods
from runtime.grace import NODE_VARIABLE, PRE_STOP_S, GracePeriods
from runtime.limit_settings import LimitSettings

Object = dict[str, Any]
"""A Kubernetes object, or part of one, as its API has it."""

HTTP_PORT, GRPC_PORT, RAY_METRICS_PORT, GCS_PORT, DASHBOARD_PORT = 8080, 8081, 8090, 6379, 8265
RAY_AGENT_PORT = 52365
"""Ray's own default; every node's agent tells its health there (`/api/healthz`)."""

PLACEMENT_S = 600
"""How long a pod may take before its processes start (node, image, init container): Kubernetes' own default."""

SETTINGS_PATH = "/etc/baton"
MODEL_DIR = "/mnt/models"
"""Where a model is in every pod: a front end's tokenizer and an engine's weights go by the same path."""

CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}
KNATIVE_SECURITY: Object = {
    **CONTAINER_SECURITY,
    **{key: value for key, value in POD_SECURITY.items() if key != "fsGroup"},
}
"""Of a predictor's containers in Knative mode: Knative refuses a pod's, and `fsGroup` with it, which emptyDirs and
ConfigMaps do without."""


def labels(settings: KubernetesSettings, revision: str, part: str) -> dict[str, str]:
    """Labels of a pod; Prometheus carries the first two over (`monitors`), queries and selectors go by them."""
    return {
        "baton-name": settings.name,
        "baton-revision": revision,
        "baton-part": part,
        "app.kubernetes.io/name": "baton",
        "app.kubernetes.io/instance": settings.name,
        "app.kubernetes.io/component": part,
    }


def pre_stop() -> Object:
    """Keep serving until what sends traffic has heard that this pod goes."""
    return {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}}


def termination_s(grace: GracePeriods) -> int:
    """`terminationGracePeriodSeconds` of every pod: how long it may take to go, `preStop` included."""
    return math.ceil(grace.pod_s)


def progress_deadline_s(limits: LimitSettings) -> int:
    """How long a Deployment's pods may take to be ready before it counts as failed."""
    return PLACEMENT_S + math.ceil(limits.start_timeout_s)


def ray_probes() -> Object:
    """Probes of a Ray node: its agent says whether the node, and on the head the cluster, lives.

    KubeRay would put in some of its own. To a RayService's workers these ask for Serve's proxy, which Baton has none
    of, so that no worker would ever be ready; older ones need `wget` in the image; a Deployment gets none at all.
    """
    alive = {"httpGet": {"path": "/api/healthz", "port": RAY_AGENT_PORT}, "periodSeconds": 5, "timeoutSeconds": 5}
    return {
        "readinessProbe": {**alive, "initialDelaySeconds": 10, "failureThreshold": 10},
        "livenessProbe": {**alive, "initialDelaySeconds": 30, "failureThreshold": 120},
    }


def scratch(*, shm: str = "2Gi") -> tuple[list[Object], list[Object]]:
    """Volumes and mounts of what a process writes, since its root is read-only: /tmp (Ray's too) and shared memory."""
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    return volumes, mounts


def settings_volume(map_name: str) -> tuple[list[Object], list[Object]]:
    """Volume and mount of a revision's settings."""
    volume = {"name": "settings", "configMap": {"name": map_name}}
    return [volume], [{"name": "settings", "mountPath": SETTINGS_PATH, "readOnly": True}]


HOME: Object = {"name": "HOME", "value": "/tmp"}  # noqa: S108
ENVIRONMENT: list[Object] = [HOME, {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
"""Of every container, whatever its revision: a home that can be written."""


def api_keys(settings: KubernetesSettings) -> list[Object]:
    """The environment variable with the API keys, where a revision has any."""
    if not settings.api_keys_secret:
        return []
    source = {"secretKeyRef": {"name": settings.api_keys_secret, "key": "keys"}}
    return [{"name": "BATON_API_KEYS", "valueFrom": source}]


def ray_environment(settings: KubernetesSettings, grace: GracePeriods) -> Object:
    """Environment of a Ray node: as any container's, and how long Ray may drain the node when it is told to go."""
    drain = {"name": NODE_VARIABLE, "value": str(math.ceil(grace.node_s))}
    return {"env": [*ENVIRONMENT, *api_keys(settings), drain]}


def model_source(
    settings: KubernetesSettings, *, with_weights: bool, shared: bool, security: Object
) -> tuple[list[Object], list[Object], list[Object]]:
    """Init container, volumes and mounts that put the model to `MODEL_DIR` before a container starts.

    Args:
        with_weights: a front end has no use for the weights and fetches the rest.
        shared: pods of one node share the cache there: the first one fetches, the others find it.
        security: the init container's `securityContext`.
    """
    if not settings.model_uri:
        return [], [], []
    cache: Object = {"name": "model-cache", "emptyDir": {}}
    if settings.cache_path and shared:
        cache = {"name": "model-cache", "hostPath": {"path": settings.cache_path, "type": "DirectoryOrCreate"}}
    mounts = [{"name": "model-cache", "mountPath": "/var/cache/baton"}, {"name": "mnt", "mountPath": "/mnt"}]
    command = ["baton", "fetch", settings.model_uri, "--cache", "/var/cache/baton", "--link", MODEL_DIR]
    command += ["--max-bytes", str(settings.cache_bytes)] if with_weights else ["--without-weights"]
    init: Object = {
        "name": "fetch-model",
        "image": settings.image,
        "command": command,
        "env": [HOME],
        "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
        "securityContext": security,
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
    }
    if settings.model_secret:
        init["envFrom"] = [{"secretRef": {"name": settings.model_secret}}]
    read_only = [{**mount, "readOnly": True} for mount in mounts]
    return [init], [cache, {"name": "mnt", "emptyDir": {}}], read_only


def resources(cpu: str, memory: str, extended: dict[str, str] | None = None) -> Object:
    """Requests and limits: memory and devices are limited to what was asked for, CPU is not throttled."""
    limits = {"memory": memory, **(extended or {})}
    return {"requests": {"cpu": cpu, **limits}, "limits": limits}


def worker_pod(
    settings: KubernetesSettings,
    grace: GracePeriods,
    revision: str,
    role: str,
    pods: PoolPods,
    gpus: int,
    command: list[str] | None,
) -> Object:
    """The template of a pool's pod: a Ray node on which one worker runs. `command` is left to KubeRay without it."""
    extended = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    security: Object = dict(CONTAINER_SECURITY)
    if pods.rdma_resource:
        extended[pods.rdma_resource] = "1"
        security["capabilities"] = {"drop": ["ALL"], "add": ["IPC_LOCK"]}  # to register memory with the device
    inits, model_volumes, model_mounts = model_source(
        settings, with_weights=True, shared=True, security=CONTAINER_SECURITY
    )
    volumes, mounts = scratch(shm=pods.shm)
    container: Object = {
        "name": "ray-worker",
        "image": settings.image,
        **ray_environment(settings, grace),
        "ports": [{"name": "metrics", "containerPort": RAY_METRICS_PORT}],
        "resources": resources(pods.cpu, pods.memory, extended),
        "securityContext": security,
        "lifecycle": pre_stop(),
        **ray_probes(),
        "volumeMounts": [*mounts, *model_mounts],
    }
    if command:
        container["command"] = command
    own = labels(settings, revision, role)
    spec: Object = {
        "serviceAccountName": settings.name,
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": termination_s(grace),
        "initContainers": inits,
        "containers": [container],
        "volumes": [*volumes, *model_volumes],
        "topologySpreadConstraints": [spread(own)],
    }
    for key, value in (("nodeSelector", pods.node_selector), ("tolerations", pods.tolerations)):
        if value:
            spec[key] = value
    if not inits:
        del spec["initContainers"]
    return {"metadata": {"labels": own}, "spec": spec}


def spread(own: dict[str, str]) -> Object:
    """Over nodes as evenly as they allow."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {key: own[key] for key in ("baton-name", "baton-revision", "baton-part")}},
    }
