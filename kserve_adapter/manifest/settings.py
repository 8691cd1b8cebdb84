"""The `kubernetes` section of a settings file: what Baton's own settings don't say about a cluster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from kv_transfer.settings import Settings
from runtime.config import Config
from runtime.config_file import explain
from runtime.errors import ConfigError

RAY_SERVICE_NAME = 47
"""Characters that KubeRay leaves a RayService's name, which is the service's and the revision's."""


class PoolPods(Settings):
    """The pods of one pool: one worker each."""

    min_replicas: int = Field(1, ge=0, description="Fewest pods.")
    max_replicas: int = Field(10, ge=1, description="Most pods.")
    cpu: str = Field("8", description="CPUs of a pod (request).")
    memory: str = Field("64Gi", description="Memory of a pod (request and limit).")
    shm: str = Field("16Gi", description="Size of /dev/shm, which engines use between their processes.")
    rdma_resource: str | None = Field(None, description="Extended resource of an RDMA device, such as `rdma/hca`.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of this pool's nodes.")
    tolerations: list[dict[str, str]] = Field(default_factory=list, description="Tolerations of this pool's pods.")


class PredictorPods(Settings):
    """The predictor's pods: Baton's front ends."""

    min_replicas: int = Field(2, ge=0, description="Fewest front ends; 0 scales to zero, pools included (Knative).")
    max_replicas: int = Field(8, ge=1, description="Most front ends.")
    cpu: str = Field("2", description="CPUs of a front end (request).")
    memory: str = Field("8Gi", description="Memory of a front end (request and limit).")
    autoscaler: Literal["hpa", "keda", "none"] = Field(
        "hpa", description="What scales the front ends in Standard mode: CPU by HPA, running requests by KEDA."
    )
    target: int = Field(70, ge=1, description="CPU percent (hpa), running requests a front end (keda), or concurrency.")


class GatewaySettings(Settings):
    """A route of our own, beside the one that KServe makes."""

    parent: str = Field(description="Name of the Gateway.")
    namespace: str = Field(description="Namespace of the Gateway.")
    hostname: str = Field(description="Host name that clients use.")
    istio: bool = Field(False, description="An Istio VirtualService in place of the HTTPRoute.")


class NetworkSettings(Settings):
    """Who may reach the pods; everything else is closed."""

    gateway_namespace: str = Field("gateway-system", description="Namespace that clients' requests come from.")
    monitoring_namespace: str = Field("monitoring", description="Namespace of Prometheus.")
    operator_namespace: str = Field("kuberay-system", description="Namespace of the KubeRay operator.")
    store_cidr: str = Field("0.0.0.0/0", description="Addresses of the model store (port 443).")


class LocalModelCacheSettings(Settings):
    """KServe's cache of whole models on nodes, for predictors that take `storageUri`."""

    node_group: str = Field(description="Name of the node group.")
    size: str = Field(description="Size of the model, such as `140Gi`.")
    limit: str = Field(description="What the group's nodes may use, such as `1Ti`.")
    path: str = Field("/var/cache/kserve", description="Directory on the nodes.")
    storage_class: str = Field("local-storage", description="Storage class of the group's volumes.")


class KubernetesSettings(Settings):
    """Everything about the cluster."""

    name: str = Field("example-llm", pattern=r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$", description="The InferenceService.")
    namespace: str | None = Field(None, description="Namespace of all objects; left to `kubectl -n` without it.")
    image: str = Field("example-registry/baton:0.1.0", description="Image built from deploy/Dockerfile.")
    model_uri: str | None = Field(None, description="The weights: a pinned URI (`baton fetch`).")
    model_secret: str | None = Field(None, description="Secret whose keys are environment variables of the store.")
    api_keys_secret: str | None = Field(None, description="Secret with the API keys in the key `keys`.")
    revision: str | None = Field(
        None, pattern=r"^[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?$", description="Name of the revision; a digest without it."
    )
    cluster_runtime: bool = Field(
        False,
        description="A ClusterServingRuntime too, for InferenceServices of other namespaces: `NAMESPACE-NAME-runtime`, "
        "or `NAME-runtime` without a namespace.",
    )
    mode: Literal["standard", "knative"] = Field("standard", description="KServe's deployment mode.")
    pools: Literal["kuberay", "rayservice", "deployments", "embedded"] = Field(
        "kuberay",
        description="Who scales the pools: KubeRay's autoscaler in a RayCluster or a RayService, KEDA over "
        "Deployments, or nobody, with everything in the predictor's pod.",
    )
    signal: Literal["desired", "queue"] = Field(
        "desired", description="What KEDA scales a pool by: Baton's own number of replicas, or 5 waiting requests each."
    )
    cache_path: str | None = Field("/var/cache/baton", description="Cache of models on nodes; a pod's own without it.")
    cache_bytes: int = Field(500 * 10**9, ge=1, description="What the models in the cache may take together.")
    prometheus_url: str = Field("http://prometheus.monitoring:9090", description="Where KEDA asks for metrics.")
    ray_version: str = Field("2.60.0", description="Version of Ray in the image.")
    prefill: PoolPods = Field(default_factory=PoolPods, description="Pods of the prefill pool.")  # type: ignore[arg-type]
    decode: PoolPods = Field(default_factory=PoolPods, description="Pods of the decode pool.")  # type: ignore[arg-type]
    predictor: PredictorPods = Field(default_factory=PredictorPods, description="The front ends.")  # type: ignore[arg-type]
    network: NetworkSettings = Field(default_factory=NetworkSettings, description="Network policies.")  # type: ignore[arg-type]
    gateway: GatewaySettings | None = Field(None, description="A route of our own.")
    local_model_cache: LocalModelCacheSettings | None = Field(None, description="KServe's LocalModelCache.")


def kubernetes_settings(config: Config) -> KubernetesSettings:
    """The section of a settings file, checked.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    try:
        settings = KubernetesSettings.model_validate(config.kubernetes)
    except ValidationError as error:
        problems = [explain(item, KubernetesSettings, "kubernetes") for item in error.errors()]
        raise ConfigError("kubernetes:\n" + "\n".join(f"  - {problem}" for problem in problems)) from error
    problems = list(_contradictions(settings))
    if problems:
        raise ConfigError("kubernetes:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return settings


def _contradictions(settings: KubernetesSettings) -> Any:
    if settings.mode == "knative" and settings.predictor.autoscaler == "keda":
        yield "Knative scales the predictor itself: predictor.autoscaler `keda` is for Standard mode"
    if settings.mode == "standard" and settings.predictor.min_replicas == 0:
        yield "predictor.min_replicas 0 (scale to zero) needs mode `knative`"
    for role in ("prefill", "decode"):
        pods: PoolPods = getattr(settings, role)
        if pods.min_replicas > pods.max_replicas:
            yield f"{role}.min_replicas is over {role}.max_replicas"
    if settings.predictor.min_replicas > settings.predictor.max_replicas:
        yield "predictor.min_replicas is over predictor.max_replicas"
    if settings.pools == "rayservice" and len(f"{settings.name}-{settings.revision}") > RAY_SERVICE_NAME:
        yield f"name and revision are {RAY_SERVICE_NAME - 1} characters at most where pools are a RayService"
    if settings.local_model_cache and not settings.model_uri:
        yield "local_model_cache needs model_uri"
