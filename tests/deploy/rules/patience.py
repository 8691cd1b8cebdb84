"""Everybody's patience with a pod: how long it may take to start, and how long to end."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import yaml

from runtime.grace import NODE_VARIABLE, GracePeriods
from tests.deploy.mutation import HEAD, POD, RUNTIME, Mutations, find, put
from tests.deploy.objects import Objects, Rule, in_knative_mode, of, pod_templates, predictors, revision_settings


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


RULES: tuple[Rule, ...] = (grace_periods_agree, starts_have_time)


def with_limits(objects: Objects, **limits: float) -> None:
    """Change `limits` in the first revision's settings, and nothing that follows from them."""
    data = find(objects, "ConfigMap")["data"]
    data["settings.yaml"] = yaml.safe_dump({**yaml.safe_load(data["settings.yaml"]), "limits": limits})


drains_longer = functools.partial(with_limits, drain_s=600)
starts_longer = functools.partial(with_limits, start_timeout_s=3600.5)
RAY_ENV = "containers.0.env"
MUTATIONS: Mutations = {
    "a short grace": ("standard-kuberay", put("InferenceService", "spec.predictor.terminationGracePeriodSeconds", 30)),
    "a worker's short grace": ("standard-kuberay", put("RayCluster", f"{POD}.terminationGracePeriodSeconds", 30)),
    "a head's short grace": ("standard-kuberay", put("RayCluster", f"{HEAD}.terminationGracePeriodSeconds", 150)),
    "a Deployment's short grace": (
        "standard-keda",
        put("Deployment", "spec.template.spec.terminationGracePeriodSeconds", 150),
    ),
    "a canary's short grace": (
        "a canary that drains longer",
        put("InferenceService", "spec.canary.0.predictor.terminationGracePeriodSeconds", 280),
    ),
    "settings that drain longer": ("standard-kuberay", drains_longer),
    "settings that drain longer, embedded": ("cpu-embedded", drains_longer),
    "another grace period of KServe's": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.model.args.0", "--grace_period=120"),
    ),
    "a worker that Ray drains for 30 s": ("standard-kuberay", put("RayCluster", f"{POD}.{RAY_ENV}", [])),
    "a head that Ray drains for 30 s": ("standard-kuberay", put("RayCluster", f"{HEAD}.{RAY_ENV}", [])),
    "a Deployment that Ray drains for longer": (
        "standard-keda",
        put("Deployment", f"spec.template.spec.{RAY_ENV}.2.value", "3600"),
    ),
    "a grace that Knative refuses": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.terminationGracePeriodSeconds", 280),
    ),
    "Knative's own timeout": ("knative-kuberay", put("InferenceService", "spec.predictor.timeout", None)),
    "a hook that Knative refuses": (
        "knative-kuberay",
        put("ServingRuntime", f"{RUNTIME}.lifecycle", {"preStop": {"exec": {"command": ["sleep", "15"]}}}),
    ),
    "no pause": ("standard-kuberay", put("ServingRuntime", f"{RUNTIME}.lifecycle.preStop.exec.command", ["true"])),
    "Deployments that start longer": ("standard-keda", starts_longer),
    "Knative's predictor that starts longer": ("knative-kuberay", starts_longer),
    "Kubernetes' own deadline": ("standard-keda", put("Deployment", "spec.progressDeadlineSeconds", None)),
    "Knative's own deadline": ("knative-kuberay canary", put("InferenceService", "spec.predictor.annotations", None)),
    "a deadline that Knative can't read": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.annotations", {"serving.knative.dev/progress-deadline": "2400"}),
    ),
}
