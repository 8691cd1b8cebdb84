"""What no schema can see: that the objects agree with each other, with the code, and with what webhooks refuse."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from kserve_adapter.manifest.guards import CARRIED
from kserve_adapter.manifest.pods import RAY_AGENT_PORT
from kserve_adapter.manifest.pools import DESIRED, QUEUE
from kserve_adapter.manifest.serving import RUNNING
from runtime.config import Config
from runtime.config_file import parse
from runtime.errors import ConfigError
from runtime.grace import NODE_VARIABLE, GracePeriods
from tests.deploy.knative import refused

Objects = list[dict[str, Any]]
Rule = Callable[[Objects], Iterator[str]]

KNOWN_METRICS = {DESIRED, QUEUE, RUNNING}
RUNTIMES_OWN = {"supportedModelFormats", "protocolVersions", "multiModel", "containers"}
PREDICTORS_OWN = {"name", "labels", "annotations", "model", "timeout", "canaryTrafficPercent"}
PREDICTORS_OWN |= {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling"}
"""Fields of a ServingRuntime and of a predictor that are KServe's; all others are the pod's."""


def of(objects: Objects, *kinds: str) -> Objects:
    """The objects of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pod_templates(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Every pod that will run: a name for it, its spec, its labels. A predictor's is put together as KServe does."""
    for item in of(objects, "RayCluster", "RayService"):
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = group["template"]
            yield f"{item['kind']}/{group.get('groupName', 'head')}", template["spec"], template["metadata"]["labels"]
    for item in of(objects, "Deployment"):
        template = item["spec"]["template"]
        yield f"Deployment/{item['metadata']['name']}", template["spec"], template["metadata"]["labels"]
    runtimes = {item["metadata"]["name"]: item["spec"] for item in of(objects, "ServingRuntime")}
    for name, predictor in predictors(objects):
        model = predictor["model"]
        runtime = runtimes[model["runtime"]]
        container = dict(runtime["containers"][0])
        for key in ("args", "env", "volumeMounts"):
            container[key] = [*container.get(key, []), *model.get(key, [])]
        common = {key: value for key, value in runtime.items() if key not in RUNTIMES_OWN}
        spec = {**common, **predictor, "containers": [container]}
        spec["volumes"] = [*runtime["volumes"], *predictor.get("volumes", [])]
        yield f"InferenceService/{name}", spec, predictor["labels"]


def predictors(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every predictor, canaries included."""
    for item in of(objects, "InferenceService"):
        yield item["metadata"]["name"], item["spec"]["predictor"]
        for canary in item["spec"].get("canary", []):
            yield f"{item['metadata']['name']}/{canary['predictor']['name']}", canary["predictor"]


def nothing_runs_as_root(objects: Objects) -> Iterator[str]:
    """Not root, nothing to gain, a root that can't be written, no unusual system calls, in every container."""
    for name, spec, _ in pod_templates(objects):
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            security = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
            if not security.get("runAsNonRoot") or not security.get("runAsUser") or not security.get("runAsGroup"):
                yield f"{name}/{container['name']} may run as root"
            if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"{name}/{container['name']} may make any system call"
            if security.get("allowPrivilegeEscalation") is not False or security["capabilities"]["drop"] != ["ALL"]:
                yield f"{name}/{container['name']} can gain privileges"
            if not security.get("readOnlyRootFilesystem"):
                yield f"{name}/{container['name']} can write its root"
            if "memory" not in container["resources"]["limits"]:
                yield f"{name}/{container['name']} has no limit on memory"


def mounts_have_volumes(objects: Objects) -> Iterator[str]:
    """Every mount names a volume, no volume is there twice, no path is mounted twice, /tmp can be written."""
    for name, spec, _ in pod_templates(objects):
        volumes = [volume["name"] for volume in spec.get("volumes", [])]
        if len(volumes) != len(set(volumes)):
            yield f"{name} has a volume twice"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            mounts = container["volumeMounts"]
            paths = [mount["mountPath"] for mount in mounts]
            if len(paths) != len(set(paths)):
                yield f"{name}/{container['name']} mounts a path twice"
            if "/tmp" not in paths:
                yield f"{name}/{container['name']} can't write anywhere"
            yield from (
                f"{name}/{container['name']} mounts {mount['name']}, which is no volume"
                for mount in mounts
                if mount["name"] not in volumes
            )


def grace_periods_agree(objects: Objects) -> Iterator[str]:
    """Everybody's patience with a pod is what `limits.drain_s` in the settings of the pod's revision makes of it."""
    revisions = dict(revision_settings(objects))
    knative = in_knative_mode(objects)
    for name, spec, labels in pod_templates(objects):
        config = revisions.get(labels["baton-revision"])
        if config is None:
            continue  # another rule says so
        grace, predictor = config.limits.grace, labels["baton-part"] == "predictor"
        yield from (f"{name}: {problem}" for problem in _kubelets_patience(spec, grace, predictor and knative))
        yield from (f"{name}: {problem}" for problem in _own_patience(spec["containers"][0], grace, predictor))


def in_knative_mode(objects: Objects) -> bool:
    """Whether the predictors are Knative's."""
    notes = [item["metadata"]["annotations"] for item in of(objects, "InferenceService")]
    return any(note["serving.kserve.io/deploymentMode"] == "Knative" for note in notes)


def _kubelets_patience(spec: dict[str, Any], grace: GracePeriods, knative: bool) -> Iterator[str]:
    """Knative gives a pod its requests' timeout and a `preStop` of its own, and refuses the pod's."""
    field, other = "terminationGracePeriodSeconds", "timeout"
    pause = {"preStop": {"exec": {"command": ["sleep", f"{grace.pre_stop_s:g}"]}}}
    wanted: dict[str, Any] | None = pause
    if knative:
        field, other, wanted = other, field, None
    if spec.get(field) != math.ceil(grace.pod_s) or other in spec:
        yield f"the kubelet is not told to wait for {grace.pod_s:g} s, by `{field}` alone"
    if spec["containers"][0].get("lifecycle") != wanted:
        yield f"its `lifecycle` is not {wanted}"


def _own_patience(container: dict[str, Any], grace: GracePeriods, predictor: bool) -> Iterator[str]:
    """A predictor has its grace period from the settings, whatever its arguments say too; a Ray node is told."""
    given = [int(arg.split("=")[1]) for arg in container.get("args", []) if arg.startswith("--grace_period=")]
    if predictor and set(given) - {math.ceil(grace.serve_s)}:
        yield f"--grace_period is not {grace.serve_s:g} s"
    drains = [entry["value"] for entry in container["env"] if entry["name"] == NODE_VARIABLE]
    if not predictor and drains != [str(math.ceil(grace.node_s))]:
        yield f"{NODE_VARIABLE} is not {grace.node_s:g} s"


def revision_settings(objects: Objects) -> Iterator[tuple[str, Config]]:
    """The settings of each revision, where they are valid."""
    for item in of(objects, "ConfigMap"):
        with contextlib.suppress(ConfigError):
            yield item["metadata"]["labels"]["baton-revision"], parse(yaml.safe_load(item["data"]["settings.yaml"]))


def starts_have_time(objects: Objects) -> Iterator[str]:
    """Who gives up pods that are not ready in time has their revision's patience on top of Kubernetes' own."""
    configs = dict(revision_settings(objects))
    deadlines: list[tuple[str, dict[str, str], str | None]] = [
        (item["metadata"]["name"], item["metadata"]["labels"], f"{item['spec'].get('progressDeadlineSeconds')}s")
        for item in of(objects, "Deployment")
    ]
    if in_knative_mode(objects):
        deadlines += [
            (name, predictor["labels"], predictor.get("annotations", {}).get("serving.knative.dev/progress-deadline"))
            for name, predictor in predictors(objects)
        ]
    for name, labels, deadline in deadlines:
        config = configs.get(labels["baton-revision"])  # without one another rule says so
        if config is not None and deadline != f"{600 + math.ceil(config.limits.start_timeout_s)}s":
            yield f"{name} is given up after {deadline}"


def probes_tell_the_truth(objects: Objects) -> Iterator[str]:
    """Ready is asked of the model, since the server always says yes in KServe; alive of the server, never the model."""
    for item in of(objects, "ServingRuntime", "ClusterServingRuntime"):
        (container,) = item["spec"]["containers"]
        if container["name"] != "kserve-container":
            yield f"{item['kind']}: the container is not called kserve-container"
        if container["readinessProbe"]["httpGet"]["path"] != "/v2/models/{{.Name}}/ready":
            yield f"{item['kind']}: readiness is not the model's"
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


def runtimes_are_found(objects: Objects) -> Iterator[str]:
    """A predictor's runtime is there and takes its format."""
    runtimes = {item["metadata"]["name"]: item["spec"] for item in of(objects, "ServingRuntime")}
    for name, predictor in predictors(objects):
        runtime = runtimes.get(predictor["model"]["runtime"])
        formats = [entry["name"] for entry in (runtime or {}).get("supportedModelFormats", [])]
        if predictor["model"]["modelFormat"]["name"] not in formats:
            yield f"{name}: its runtime is not there or does not take its format"


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


def knative_would_agree(objects: Objects) -> Iterator[str]:
    """The rules of Knative's webhook: most of a pod's fields need a feature flag that is off by default."""
    if not in_knative_mode(objects):
        return
    for name, spec, labels in pod_templates(objects):
        if labels["baton-part"] == "predictor":
            pod = {key: value for key, value in spec.items() if key not in PREDICTORS_OWN}
            yield from (f"{name}: to Knative, {problem}" for problem in refused(pod))


def kuberay_would_agree(objects: Objects) -> Iterator[str]:
    """The rules of KubeRay's operator, which schemas don't have."""
    longest = {"RayCluster": 53, "RayService": 47}
    for item in of(objects, *longest):
        kind, name = item["kind"], item["metadata"]["name"]
        if len(name) > longest[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{kind} {name}: KubeRay takes no such name"
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            where = f"{kind} {name}/{group.get('groupName', 'head')}"
            if "labels" in group["rayStartParams"]:
                yield f"{where}: labels belong into the group's own field"
            if (
                spec.get("enableInTreeAutoscaling")
                and group["template"]["spec"].get("restartPolicy", "Never") != "Never"
            ):
                yield f"{where}: its pods are the autoscaler's to replace"
            if group.get("minReplicas", 0) > group.get("maxReplicas", 1):
                yield f"{where}: bounds"


def settings_are_batons(objects: Objects) -> Iterator[str]:
    """The settings that pods read are valid, and those of the predictor's own revision and pools."""
    maps = {item["metadata"]["name"]: item["data"]["settings.yaml"] for item in of(objects, "ConfigMap")}
    for name, spec, labels in pod_templates(objects):
        for volume in spec["volumes"]:
            if "configMap" not in volume:
                continue
            text = maps.get(volume["configMap"]["name"])
            if text is None:
                yield f"{name} mounts settings that are not there"
                continue
            try:
                config = parse(yaml.safe_load(text), name)
            except ConfigError as error:
                yield f"{name}: {error}"
                continue
            if config.name != f"{labels['baton-name']}-{labels['baton-revision']}":
                yield f"{name} reads another revision's settings"


def revisions_stay_apart(objects: Objects) -> Iterator[str]:
    """A predictor joins the Ray cluster of its own revision."""
    clusters = {item["metadata"]["name"] for item in of(objects, "RayCluster", "RayService")}
    for name, spec, labels in pod_templates(objects):
        own = f"{labels['baton-name']}-{labels['baton-revision']}"
        for container in spec["containers"]:
            words = [*container.get("command", []), *(entry.get("value", "") for entry in container.get("env", []))]
            for address in re.findall(r"([a-z0-9-]+)-head-svc:6379", " ".join(words)):
                if address != own or address not in clusters:
                    yield f"{name} joins {address}, which is not its revision's cluster"


def pools_get_their_hardware(objects: Objects) -> Iterator[str]:
    """A pool's nodes carry the label that its workers ask for, and GPUs enough for one."""
    (first, *_) = of(objects, "ConfigMap")
    try:
        config = parse(yaml.safe_load(first["data"]["settings.yaml"]))
    except ConfigError:
        return  # another rule says so
    for item in of(objects, "RayCluster", "RayService"):
        spec = item["spec"].get("rayClusterConfig", item["spec"])
        for group in spec["workerGroupSpecs"]:
            pool = config.pool(group["groupName"])
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            if group["labels"] != pool.label_selector:
                yield f"no worker asks for the label of {group['groupName']}"
            if int(limits.get("nvidia.com/gpu", 0)) * pool.nodes != pool.num_gpus:
                yield f"{group['groupName']} has other GPUs than its worker needs"
    for item in of(objects, "Deployment"):
        labels = item["spec"]["template"]["metadata"]["labels"]
        pool = config.pool(labels["baton-part"])
        (container,) = item["spec"]["template"]["spec"]["containers"]
        wanted = ",".join(f"{key}={value}" for key, value in pool.label_selector.items())
        if (
            f"--labels={wanted}" not in container["command"]
            or f"--num-gpus={pool.num_gpus}" not in container["command"]
        ):
            yield f"{item['metadata']['name']} offers not what its worker asks for"


def weights_are_the_pinned_ones(objects: Objects) -> Iterator[str]:
    """Front ends and engines read the same model, from the path that they are told."""
    uris = set()
    for name, spec, labels in pod_templates(objects):
        for init in spec.get("initContainers", []):
            uris.add((labels["baton-revision"], init["command"][2]))
            if init["command"][init["command"].index("--link") + 1] != "/mnt/models":
                yield f"{name}: the model is not where it is looked for"
    if len(uris) != len({revision for revision, _ in uris}):
        yield f"pods of one revision fetch different weights: {sorted(uris)}"


RULES: tuple[Rule, ...] = (
    nothing_runs_as_root,
    mounts_have_volumes,
    grace_periods_agree,
    starts_have_time,
    probes_tell_the_truth,
    ray_nodes_tell_their_health,
    runtimes_are_found,
    selectors_match,
    every_pod_is_closed,
    queries_name_what_exists,
    scalers_have_targets,
    kserves_webhooks_would_agree,
    knative_would_agree,
    kuberay_would_agree,
    settings_are_batons,
    revisions_stay_apart,
    pools_get_their_hardware,
    weights_are_the_pinned_ones,
)


def broken(objects: Objects) -> list[str]:
    """Everything that breaks a rule."""
    return [problem for rule in RULES for problem in rule(objects)]
