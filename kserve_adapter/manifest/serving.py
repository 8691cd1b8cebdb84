"""KServe's side: runtimes, the InferenceService with its canary, our own routes."""

from __future__ import annotations

from dataclasses import dataclass

from kserve_adapter.manifest.pods import (
    CONTAINER_SECURITY,
    ENVIRONMENT,
    GRPC_PORT,
    HTTP_PORT,
    KNATIVE_SECURITY,
    MODEL_DIR,
    POD_SECURITY,
    SETTINGS_PATH,
    Object,
    api_keys,
    labels,
    model_source,
    pre_stop,
    progress_deadline_s,
    resources,
    scratch,
    settings_volume,
    spread,
    termination_s,
)
from kserve_adapter.manifest.pools import cluster_name, head_address
from kserve_adapter.manifest.settings import KubernetesSettings
from runtime.limit_settings import LimitSettings

FORMAT = "baton"
RUNNING = "vllm:num_requests_running"
"""vLLM's own gauge: what a front end works on."""

PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"
"""Annotation of a revision of Knative's, which is scaled to zero when it is not ready by then."""


@dataclass(frozen=True)
class Revision:
    """One revision as the InferenceService refers to it.

    Attributes:
        settings: of the cluster, as this revision's file has them.
        name: of the revision.
        settings_map: ConfigMap with its settings.
        limits: how long its pods may take to start and to go.
    """

    settings: KubernetesSettings
    name: str
    settings_map: str
    limits: LimitSettings


def runtimes(settings: KubernetesSettings) -> list[Object]:
    """The runtime that the predictors use, and where it is asked for the same for the whole cluster."""
    spec, own = _runtime_spec(settings), f"{settings.name}-runtime"
    names = {"ServingRuntime": own}
    if settings.cluster_runtime:
        names["ClusterServingRuntime"] = f"{settings.namespace}-{own}" if settings.namespace else own
    return [
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "labels": {"baton-name": settings.name}},
            "spec": spec,
        }
        for kind, name in names.items()
    ]


def _runtime_spec(settings: KubernetesSettings) -> Object:
    """What all revisions have in common: how to start, and probes that tell the truth.

    A predictor has its own revision's image, resources and keys, which KServe puts over the ones here.
    """
    _, mounts = scratch()
    # Of the server, not of a model by name: a canary's InferenceService is called otherwise than its model.
    ready = {"httpGet": {"path": "/v2/health/ready", "port": HTTP_PORT}}
    live = {"httpGet": {"path": "/v2/health/live", "port": HTTP_PORT}}
    args = ["--model_name={{.Name}}", f"--config_file={SETTINGS_PATH}/settings.yaml"]
    # No `--grace_period`: a predictor has it from its revision's settings.
    args += [f"--http_port={HTTP_PORT}", f"--grpc_port={GRPC_PORT}"]
    container: Object = {
        "name": "kserve-container",
        "image": settings.image,
        "command": ["python", "-m", "kserve_adapter"],
        "args": args,
        "env": ENVIRONMENT,
        "ports": [{"containerPort": HTTP_PORT, "protocol": "TCP"}],
        "resources": resources(settings.predictor.cpu, settings.predictor.memory),
        "securityContext": _security(settings),
        # Knative has a hook of its own and refuses others.
        **({"lifecycle": pre_stop()} if settings.mode == "standard" else {}),
        # The server lives while the front end waits for workers, and they for their weights: this is for the process.
        "startupProbe": {**live, "periodSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**live, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 2},
        "volumeMounts": mounts,
    }
    volumes, _ = scratch()
    return {
        "supportedModelFormats": [{"name": FORMAT, "version": "1", "autoSelect": True, "priority": 1}],
        "protocolVersions": ["v1", "v2", "grpc-v2"],
        "multiModel": False,
        "containers": [container],
        "volumes": volumes,
    }


def inference_service(stable: Revision, canary: Revision | None = None, percent: int = 0) -> Object:
    """The InferenceService; with a canary, in the way of its mode.

    Standard mode lists canaries beside the stable predictor; Knative takes the new revision as the predictor and splits
    by revision, so there the object is the canary's, and the earlier one goes on serving the rest.
    """
    settings = stable.settings
    annotations = {
        "serving.kserve.io/deploymentMode": "Standard" if settings.mode == "standard" else "Knative",
    }
    if settings.mode == "standard":
        annotations["serving.kserve.io/autoscalerClass"] = settings.predictor.autoscaler
    spec: Object = {"predictor": _predictor(stable)}
    if canary and settings.mode == "knative":
        spec = {"predictor": {**_predictor(canary), "canaryTrafficPercent": percent}}
    elif canary:
        predictor = _predictor(canary)
        for key in ("minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"):
            predictor.pop(key, None)
        predictor["model"] = {"name": "kserve-container", **predictor["model"]}  # required here, unlike above
        predictor = {"name": canary.name, **predictor, "minReplicas": max(1, settings.predictor.min_replicas)}
        spec["canary"] = [{"predictor": predictor, "trafficPercent": percent}]
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": settings.name, "labels": {"baton-name": settings.name}, "annotations": annotations},
        "spec": spec,
    }


def _predictor(revision: Revision) -> Object:
    settings = revision.settings
    embedded = settings.pools == "embedded"
    # To Knative a `hostPath` is there to be read.
    shared = embedded and settings.mode == "standard"
    inits, model_volumes, model_mounts = model_source(
        settings, with_weights=embedded, shared=shared, security=_security(settings)
    )
    volumes, mounts = settings_volume(revision.settings_map)
    own = labels(settings, revision.name, "predictor")
    env = api_keys(settings)
    if not embedded:
        env.append({"name": "BATON_RAY_ADDRESS", "value": head_address(settings, revision.name)})
    model: Object = {
        "modelFormat": {"name": FORMAT},
        "runtime": f"{settings.name}-runtime",
        "protocolVersion": "v2",
        "image": settings.image,
        "args": [f"--application={cluster_name(settings, revision.name)}"],
        **({"env": env} if env else {}),
        "resources": resources(settings.predictor.cpu, settings.predictor.memory),
        "volumeMounts": [*mounts, *model_mounts],
    }
    if settings.model_uri:
        model["args"].append(f"--model_dir={MODEL_DIR}")
    predictor: Object = {
        "labels": own,
        "serviceAccountName": settings.name,
        "automountServiceAccountToken": False,
        **_by_mode(revision, own),
        **_scale(settings),
        "model": model,
    }
    if settings.local_model_cache:
        model["storageUri"] = settings.model_uri
        model["volumeMounts"] = mounts
    else:
        volumes += model_volumes
        if inits:
            predictor["initContainers"] = inits
    return {**predictor, "volumes": volumes}


def _security(settings: KubernetesSettings) -> Object:
    return CONTAINER_SECURITY if settings.mode == "standard" else KNATIVE_SECURITY


def _by_mode(revision: Revision, own: dict[str, str]) -> Object:
    """What a pod says for itself in Standard mode. Knative refuses it, and has ways of its own.

    It takes a pod's grace period from its requests' timeout alone, and prefers other nodes for a revision's pods. In
    Standard mode the progress deadline is KServe's to set.
    """
    seconds = termination_s(revision.limits.grace)
    if revision.settings.mode == "knative":
        return {
            "annotations": {PROGRESS_DEADLINE: f"{progress_deadline_s(revision.limits)}s"},
            "timeout": seconds,
        }
    return {
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": seconds,
        "topologySpreadConstraints": [spread(own)],
    }


def _scale(settings: KubernetesSettings) -> Object:
    pods = settings.predictor
    bounds: Object = {"minReplicas": pods.min_replicas, "maxReplicas": pods.max_replicas}
    if settings.mode == "knative":
        return {**bounds, "scaleMetric": "concurrency", "scaleTarget": pods.target}
    if pods.autoscaler == "hpa":
        return {**bounds, "scaleMetric": "cpu", "scaleTarget": pods.target}
    if pods.autoscaler == "keda":
        # KServe honours `value` alone, and puts no label into the query: it is scoped here. Every predictor tells of
        # every worker.
        query = f'sum(max by (worker) ({RUNNING}{{baton_name="{settings.name}"}}))'
        metric = {"backend": "prometheus", "serverAddress": settings.prometheus_url, "query": query}
        external = {"metric": metric, "target": {"type": "Value", "value": str(pods.target)}}
        return {**bounds, "autoScaling": {"metrics": [{"type": "External", "external": external}]}}
    return {"minReplicas": pods.min_replicas}


def canary_service(canary: Revision) -> Object:
    """An InferenceService of the canary's own, for a route of ours that splits between two."""
    made = inference_service(canary)
    made["metadata"]["name"] = f"{canary.settings.name}-canary"
    # Clients ask both for the same model.
    made["spec"]["predictor"]["model"]["args"].append(f"--model_name={canary.settings.name}")
    return made


def route(settings: KubernetesSettings, canary_percent: int | None) -> list[Object]:
    """Our own route to the predictors, weighted where there is a canary service."""
    gateway = settings.gateway
    if gateway is None:
        return []
    weights = {f"{settings.name}-predictor": 100 - (canary_percent or 0)}
    if canary_percent is not None:
        weights[f"{settings.name}-canary-predictor"] = canary_percent
    meta = {"name": settings.name, "labels": {"baton-name": settings.name}}
    if gateway.istio:
        destinations = [
            {"destination": {"host": name, "port": {"number": 80}}, "weight": weight}
            for name, weight in weights.items()
        ]
        spec: Object = {
            "hosts": [gateway.hostname],
            "gateways": [f"{gateway.namespace}/{gateway.parent}"],
            "http": [{"route": destinations, "timeout": "0s"}],
        }
        return [{"apiVersion": "networking.istio.io/v1beta1", "kind": "VirtualService", "metadata": meta, "spec": spec}]
    backends = [{"name": name, "port": 80, "weight": weight} for name, weight in weights.items()]
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
        "backendRefs": backends,
        "timeouts": {"request": "0s"},  # streams take their time
    }
    spec = {
        "parentRefs": [{"name": gateway.parent, "namespace": gateway.namespace}],
        "hostnames": [gateway.hostname],
        "rules": [rule],
    }
    return [{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": spec}]
