"""The two pools: pods of one Ray cluster for each revision, and what scales them."""

from __future__ import annotations

from typing import Any

from kserve_adapter.manifest.pods import (
    CONTAINER_SECURITY,
    DASHBOARD_PORT,
    GCS_PORT,
    POD_SECURITY,
    RAY_METRICS_PORT,
    Object,
    labels,
    pre_stop,
    progress_deadline_s,
    ray_environment,
    ray_probes,
    resources,
    scratch,
    settings_volume,
    termination_s,
    worker_pod,
)
from kserve_adapter.manifest.settings import KubernetesSettings, PoolPods
from runtime.config import ROLES, Config, Role
from runtime.grace import GracePeriods

DESIRED, QUEUE = "baton_pool_desired_replicas", "baton_pool_queue_depth"
"""Metrics of the front ends, one series a pool."""

QUEUE_THRESHOLD = 5


def cluster_name(settings: KubernetesSettings, revision: str) -> str:
    """The revision's Ray cluster, and the name of everything that is its alone."""
    return f"{settings.name}-{revision}"


def head_address(settings: KubernetesSettings, revision: str) -> str:
    """Where a node joins: KubeRay's service of the head."""
    return f"{cluster_name(settings, revision)}-head-svc:{GCS_PORT}"


def pools(settings: KubernetesSettings, config: Config, revision: str, settings_map: str) -> list[Object]:
    """The objects of a revision's pools."""
    if settings.pools == "embedded":
        return []
    head = _head(settings, config.limits.grace, revision, settings_map)
    if settings.pools == "deployments":
        made = [_cluster(settings, head, [], revision)]
        for role in ROLES:
            made += [_deployment(settings, config, revision, role), _scaled_object(settings, revision, role)]
        return made
    groups = [_group(settings, config, revision, role) for role in ROLES]
    cluster = _cluster(settings, head, groups, revision)
    return [cluster if settings.pools == "kuberay" else _service(settings, cluster, revision)]


def _head(settings: KubernetesSettings, grace: GracePeriods, revision: str, settings_map: str) -> Object:
    volumes, mounts = scratch()
    more_volumes, more_mounts = settings_volume(settings_map)
    container = {
        "name": "ray-head",
        "image": settings.image,
        **ray_environment(settings, grace),
        "ports": [
            {"name": "gcs", "containerPort": GCS_PORT},
            {"name": "dashboard", "containerPort": DASHBOARD_PORT},
            {"name": "metrics", "containerPort": RAY_METRICS_PORT},
        ],
        "resources": resources("2", "8Gi"),
        "securityContext": CONTAINER_SECURITY,
        "lifecycle": pre_stop(),
        **ray_probes(),
        "volumeMounts": [*mounts, *more_mounts],
    }
    spec = {
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": termination_s(grace),  # the workers', which need the head to drain
        "containers": [container],
        "volumes": [*volumes, *more_volumes],
    }
    if settings.pools == "deployments":  # else KubeRay makes an account for the autoscaler beside the head
        spec |= {"serviceAccountName": settings.name, "automountServiceAccountToken": False}
    return {
        # Nothing of the pools lands on the head: it has no CPUs to give, and no label of a pool.
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",  # noqa: S104  # KubeRay's operator asks it
            "metrics-export-port": str(RAY_METRICS_PORT),
            "object-store-memory": str(10**9),  # Ray would take more than /dev/shm has, and Baton makes few objects
        },
        "template": {"metadata": {"labels": labels(settings, revision, "head")}, "spec": spec},
    }


def _group(settings: KubernetesSettings, config: Config, revision: str, role: Role) -> Object:
    pods: PoolPods = getattr(settings, role)
    return {
        "groupName": role,
        "replicas": pods.min_replicas,
        "minReplicas": pods.min_replicas,
        "maxReplicas": pods.max_replicas,
        "numOfHosts": config.pool(role).nodes,
        "labels": pool_label(role),
        "rayStartParams": {"metrics-export-port": str(RAY_METRICS_PORT)},
        "template": worker_pod(settings, config.limits.grace, revision, role, pods, _gpus(config, role), None),
    }


def _cluster(settings: KubernetesSettings, head: Object, groups: list[Object], revision: str) -> Object:
    spec: Object = {"rayVersion": settings.ray_version, "headGroupSpec": head, "workerGroupSpecs": groups}
    if groups:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
            "securityContext": CONTAINER_SECURITY,
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": cluster_name(settings, revision), "labels": labels(settings, revision, "pools")},
        "spec": spec,
    }


def _service(settings: KubernetesSettings, cluster: Object, revision: str) -> Object:
    """KubeRay deploys the application itself, and the predictors find it there."""
    import yaml

    serve = {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": cluster_name(settings, revision),
                "import_path": "runtime.app:build_pools",
                "args": {"config": "/etc/baton/settings.yaml"},
            }
        ],
    }
    spec = {"serveConfigV2": yaml.safe_dump(serve, sort_keys=False), "rayClusterConfig": cluster["spec"]}
    return {**cluster, "kind": "RayService", "spec": spec}


def _deployment(settings: KubernetesSettings, config: Config, revision: str, role: Role) -> Object:
    pods: PoolPods = getattr(settings, role)
    label = ",".join(f"{key}={value}" for key, value in pool_label(role).items())
    command = ["ray", "start", "--block", f"--address={head_address(settings, revision)}", f"--labels={label}"]
    command += [f"--metrics-export-port={RAY_METRICS_PORT}", f"--num-gpus={_gpus(config, role)}"]
    template = worker_pod(settings, config.limits.grace, revision, role, pods, _gpus(config, role), command)
    own: dict[str, str] = template["metadata"]["labels"]
    selector = {key: own[key] for key in ("baton-name", "baton-revision", "baton-part")}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{cluster_name(settings, revision)}-{role}", "labels": own},
        # No `replicas`: they are KEDA's.
        "spec": {
            "selector": {"matchLabels": selector},
            "template": template,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": progress_deadline_s(config.limits),
        },
    }


def _scaled_object(settings: KubernetesSettings, revision: str, role: Role) -> Object:
    pods: PoolPods = getattr(settings, role)
    name = f"{cluster_name(settings, revision)}-{role}"
    scope = f'pool="{role}",baton_name="{settings.name}",baton_revision="{revision}"'
    # Every front end exports the whole pool's numbers, as the scaler told it: not a sum.
    metric, threshold = (DESIRED, 1) if settings.signal == "desired" else (QUEUE, QUEUE_THRESHOLD)
    query = f"max({metric}{{{scope}}})"
    metadata: dict[str, Any] = {
        "serverAddress": settings.prometheus_url,
        "query": query,
        "threshold": str(threshold),
        "ignoreNullValues": "false",  # no answer is no reason to scale down
    }
    advanced: Object = {}
    if settings.signal == "desired":
        # Kubernetes would leave 10 pods alone where 9 or 11 are wanted: within a tenth.
        behavior = {"scaleUp": {"tolerance": "0"}, "scaleDown": {"tolerance": "0"}}
        advanced = {"advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}}}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name, "labels": labels(settings, revision, role)},
        "spec": {
            **advanced,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicaCount": pods.min_replicas,
            "maxReplicaCount": pods.max_replicas,
            "pollingInterval": 15,
            "cooldownPeriod": 300,
            "fallback": {"failureThreshold": 4, "replicas": max(1, pods.min_replicas), "behavior": "currentReplicas"},
            "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": metadata}],
        },
    }


def pool_label(role: str) -> dict[str, str]:
    """Ray's label of a pool's nodes: a worker asks for it (`label_selector`)."""
    return {"pool": role}


def _gpus(config: Config, role: Role) -> int:
    """GPUs of one pod: a worker's, or its share where it spans several machines."""
    return -(-config.pool(role).num_gpus // config.pool(role).nodes)
