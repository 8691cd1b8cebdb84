"""Every manifest of every preset: by schema, by rule, and that a wrong field is noticed."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_adapter.manifest.presets import PRESETS, config, files
from kserve_adapter.manifest.reference import reference
from kserve_adapter.manifest.render import render, to_yaml
from runtime.cli import main
from runtime.config_file import parse
from runtime.errors import ConfigError
from tests.conftest import ROOT
from tests.deploy.knative import FLAGS
from tests.deploy.rules import Objects, broken, in_knative_mode, of, predictors
from tests.deploy.schemas import CRDS, is_custom, problems

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(),
    reason="BATON_CRDS names no folder with the CRDs of KServe, KubeRay, KEDA, Gateway API and Prometheus",
)


def changed(preset: str, **kubernetes: Any) -> dict[str, Any]:
    """A preset's settings with some of the cluster's changed."""
    data = copy.deepcopy(PRESETS[preset])
    data["kubernetes"].update(kubernetes)
    return data


GATEWAY = {"parent": "public", "namespace": "gateway-system", "hostname": "llm.example.org"}
CANARY = {"revision": "v2", "model_uri": "s3://example-bucket/example-llm/v2"}
CACHE = {"node_group": "gpu", "size": "140Gi", "limit": "1Ti"}


def sets() -> dict[str, Objects]:
    """Everything that is checked: the presets, and each choice that they don't make."""
    made = {preset: render(config(preset)) for preset in PRESETS}
    for preset in ("standard-kuberay", "knative-kuberay", "standard-keda"):
        canary = parse(changed(preset, **CANARY))
        made[f"{preset} canary"] = render(config(preset), canary, 10)
    for istio in (False, True):
        gateway = {"gateway": {**GATEWAY, "istio": istio}}
        first, second = (
            parse(changed("standard-kuberay", **gateway)),
            parse(changed("standard-kuberay", **gateway, **CANARY)),
        )
        made[f"route istio={istio}"] = render(first)
        made[f"route canary istio={istio}"] = render(first, second, 5)
    longer = parse({**changed("standard-kuberay", **CANARY), "limits": {"drain_s": 600.5, "wait_for_worker_s": 10}})
    made["a canary that drains longer"] = render(config("standard-kuberay"), longer, 10)
    made["local model cache"] = render(parse(changed("standard-kuberay", local_model_cache=CACHE)))
    made["knative embedded"] = render(parse(changed("cpu-embedded", mode="knative")))
    made["desired"] = render(
        parse(changed("standard-keda", signal="desired", namespace="models", api_keys_secret="keys"))
    )
    return made


SETS = sets()


@pytest.mark.parametrize("name", SETS)
def test_built_in_kinds_by_schema(name: str) -> None:
    """By Kubernetes' own schemas, with no unknown fields."""
    checked = [item for item in SETS[name] if not is_custom(item)]
    assert len(checked) > 5
    assert not [problem for item in checked for problem in problems(item)]


@needs_crds
@pytest.mark.parametrize("name", SETS)
def test_custom_kinds_by_schema(name: str) -> None:
    """By the projects' own CRDs, with no field that an API server would prune."""
    checked = [item for item in SETS[name] if is_custom(item)]
    assert len(checked) > 3
    assert not [problem for item in checked for problem in problems(item)]


@pytest.mark.parametrize("name", SETS)
def test_rules(name: str) -> None:
    """What schemas can't see."""
    assert not broken(SETS[name])


def fresh(name: str) -> Objects:
    """A copy in which no two objects share a part."""
    made: Objects = json.loads(json.dumps(SETS[name]))
    return made


def find(objects: Objects, kind: str) -> dict[str, Any]:
    """The first object of a kind."""
    return of(objects, kind)[0]


def put(kind: str, path: str, value: Any) -> Callable[[Objects], None]:
    """Set a field of the first object of a kind; None removes it."""

    def mutate(objects: Objects) -> None:
        at: Any = find(objects, kind)
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            at = at[part]
        if value is None:
            del at[last]
        elif isinstance(at, list) and last == len(at):
            at.append(value)
        else:
            at[last] = value

    return mutate


def with_limits(objects: Objects, **limits: float) -> None:
    """Change `limits` in the first revision's settings, and nothing that follows from them."""
    data = find(objects, "ConfigMap")["data"]
    data["settings.yaml"] = yaml.safe_dump({**yaml.safe_load(data["settings.yaml"]), "limits": limits})


drains_longer = functools.partial(with_limits, drain_s=600)
starts_longer = functools.partial(with_limits, start_timeout_s=3600.5)


RUNTIME = "spec.containers.0"
WORKERS = "spec.workerGroupSpecs.0"
POD = f"{WORKERS}.template.spec"
HEAD = "spec.headGroupSpec.template.spec"
RAY_ENV = "containers.0.env"
SCHEMA_MUTATIONS = {
    "misspelt count": ("standard-keda", put("ScaledObject", "spec.minReplicaCnt", 1)),
    "a string canary": ("standard-kuberay canary", put("InferenceService", "spec.canary.0.trafficPercent", "10")),
    "storageURI": ("standard-kuberay", put("InferenceService", "spec.predictor.model.storageURI", "s3://x/y")),
    "group without name": ("standard-kuberay", put("RayCluster", f"{WORKERS}.groupName", None)),
    "replicas as text": ("standard-kuberay", put("RayCluster", f"{WORKERS}.maxReplicas", "ten")),
    "a weight too many": ("route canary istio=False", put("HTTPRoute", "spec.rules.0.backendRefs.0.weigth", 1)),
    "an endpoint's typo": ("standard-keda", put("PodMonitor", "spec.podMetricsEndpoints.0.portNumer", 1)),
    "a probe's typo": ("standard-kuberay", put("ServingRuntime", f"{RUNTIME}.readinessProbe.httpGte", {})),
    "a policy's typo": ("standard-kuberay", put("NetworkPolicy", "spec.podSelectors", {})),
    "a budget's type": ("standard-kuberay", put("PodDisruptionBudget", "spec.maxUnavailable", ["1"])),
    "an unknown field": ("standard-keda", put("Deployment", "spec.template.spec.tolerations.0.key_", "x")),
}
RULE_MUTATIONS = {
    "root": ("standard-kuberay", put("RayCluster", f"{POD}.securityContext.runAsUser", 0)),
    "root in Knative mode": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.initContainers.0.securityContext.runAsUser", None),
    ),
    "any system call": ("standard-kuberay", put("RayCluster", f"{HEAD}.securityContext.seccompProfile", None)),
    "a writable root": (
        "standard-kuberay",
        put("RayCluster", f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", False),
    ),
    "no limit": ("standard-kuberay", put("RayCluster", f"{POD}.containers.0.resources.limits.memory", None)),
    "an unknown volume": ("standard-kuberay", put("RayCluster", f"{POD}.containers.0.volumeMounts.0.name", "x")),
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
    "Deployments that start longer": ("standard-keda", starts_longer),
    "Knative's predictor that starts longer": ("knative-kuberay", starts_longer),
    "Kubernetes' own deadline": ("standard-keda", put("Deployment", "spec.progressDeadlineSeconds", None)),
    "Knative's own deadline": ("knative-kuberay canary", put("InferenceService", "spec.predictor.annotations", None)),
    "a deadline that Knative can't read": (
        "knative-kuberay",
        put("InferenceService", "spec.predictor.annotations", {"serving.knative.dev/progress-deadline": "2400"}),
    ),
    "no pause": ("standard-kuberay", put("ServingRuntime", f"{RUNTIME}.lifecycle.preStop.exec.command", ["true"])),
    "a probe that lies": (
        "standard-kuberay",
        put("ServingRuntime", f"{RUNTIME}.readinessProbe.httpGet.path", "/v2/health/ready"),
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
    "another format": ("standard-kuberay", put("InferenceService", "spec.predictor.model.modelFormat.name", "onnx")),
    "a budget for nobody": (
        "standard-kuberay",
        put("PodDisruptionBudget", "spec.selector.matchLabels.baton-part", "router"),
    ),
    "an open pod": ("standard-kuberay", put("InferenceService", "spec.predictor.labels.baton-name", "other")),
    "open to all": ("standard-kuberay", put("NetworkPolicy", "spec.ingress", [{}])),
    "a metric that is not": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'max(baton_queue{baton_name="example-llm"})'),
    ),
    "a label that is not": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'max(baton_pool_queue_depth{app="example-llm"})'),
    ),
    "each front end's sum": (
        "standard-keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", 'sum(baton_pool_queue_depth{baton_name="example-llm"})'),
    ),
    "labels not carried": ("standard-keda", put("PodMonitor", "spec.podTargetLabels", [])),
    "a format that renames": ("standard-keda", put("PodMonitor", "spec.scrapeProtocols", None)),
    "a name too long": ("standard-rayservice", put("RayService", "metadata.name", "example-llm-" + "v" * 36)),
    "labels that KubeRay refuses": (
        "standard-kuberay",
        put("RayCluster", f"{WORKERS}.rayStartParams.labels", "pool=prefill"),
    ),
    "pods that restart themselves": ("standard-kuberay", put("RayCluster", f"{POD}.restartPolicy", "Always")),
    "bounds the wrong way round": ("standard-kuberay", put("RayCluster", f"{WORKERS}.maxReplicas", 0)),
    "KEDA on a RayCluster": ("standard-keda", put("ScaledObject", "spec.scaleTargetRef.kind", "RayCluster")),
    "fixed replicas": ("standard-keda", put("Deployment", "spec.replicas", 1)),
    "Knative's canary in Standard": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.canaryTrafficPercent", 9),
    ),
    "a canary that scales": (
        "standard-kuberay canary",
        put("InferenceService", "spec.canary.0.predictor.maxReplicas", 3),
    ),
    "averageValue": (
        "standard-keda",
        put("InferenceService", "spec.predictor.autoScaling.metrics.0.external.target", {"averageValue": "5"}),
    ),
    "another cluster": (
        "standard-kuberay",
        put("InferenceService", "spec.predictor.model.env.0.value", "x-head-svc:6379"),
    ),
    "a GPU too few": (
        "standard-kuberay",
        put("RayCluster", f"{POD}.containers.0.resources.limits", {"nvidia.com/gpu": "1", "memory": "1Gi"}),
    ),
    "another label": ("standard-kuberay", put("RayCluster", f"{WORKERS}.labels.pool", "x")),
    "invalid settings": ("standard-kuberay", put("ConfigMap", "data", {"settings.yaml": "modle: x"})),
    "other weights": ("standard-kuberay", put("RayCluster", f"{POD}.initContainers.0.command.2", "s3://m/v0")),
    "a model elsewhere": ("standard-kuberay", put("RayCluster", f"{POD}.initContainers.0.command.6", "/models")),
}


@pytest.mark.parametrize("name", SCHEMA_MUTATIONS)
def test_schemas_notice(name: str) -> None:
    """A wrong field of each kind fails the check by schema."""
    set_name, mutate = SCHEMA_MUTATIONS[name]
    before, objects = fresh(set_name), fresh(set_name)
    mutate(objects)
    (wrong,) = [item for item, was in zip(objects, before, strict=True) if item != was]
    if is_custom(wrong) and not CRDS.is_dir():
        pytest.skip("BATON_CRDS names no folder with CRDs")
    assert problems(wrong)


FREE = frozenset(
    (
        "labels",
        "annotations",
        "matchLabels",
        "nodeSelector",
        "capacity",
        "data",
        "rayStartParams",
        "limits",
        "requests",
        "metadata",
    )
)
"""Fields whose own fields are anybody's names."""


def fields(part: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field that has a name of the API's; of a list's items those of all of them."""
    if isinstance(part, dict) and not (at and at[-1] in FREE):
        for name, value in part.items():
            yield (*at, name)
            yield from fields(value, (*at, name))
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from fields(value, (*at, number))


def each_field() -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """For each kind, one object for each field that any of our objects has."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for name in SETS:
        for item in fresh(name):
            for path in fields(item):
                alike = tuple(part for part in path if not isinstance(part, int))
                found.setdefault(item["kind"], {}).setdefault(alike, {"item": item, "path": path})
    return found


EACH_FIELD = each_field()


@pytest.mark.parametrize("kind", EACH_FIELD)
def test_every_misspelt_field_is_noticed(kind: str) -> None:
    """Whichever field of whichever kind is misspelt, the check by schema fails."""
    unnoticed = []
    for path, found in EACH_FIELD[kind].items():
        if path[0] in ("apiVersion", "kind", "metadata"):
            continue  # what an object is and is called: other tests look for it by these
        if is_custom(found["item"]) and not CRDS.is_dir():
            pytest.skip("BATON_CRDS names no folder with CRDs")
        item = copy.deepcopy(found["item"])
        *way, last = found["path"]
        at: Any = item
        for part in way:
            at = at[part]
        at[f"{last}Typo"] = at.pop(last)
        if not problems(item):
            unnoticed.append(".".join(path))
    assert not unnoticed


@pytest.mark.parametrize("name", RULE_MUTATIONS)
def test_rules_notice(name: str) -> None:
    """A disagreement that schemas accept fails a rule."""
    set_name, mutate = RULE_MUTATIONS[name]
    objects = fresh(set_name)
    mutate(objects)
    assert broken(objects)


def test_the_files_are_those_of_the_code() -> None:
    """`deploy/chart/presets` is what `make manifests` writes: there is no second source."""
    folder = ROOT / "deploy/chart/presets"
    there = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert there == files(), "run `make manifests`"


def test_the_reference_is_up_to_date() -> None:
    """`make docs` was run after the last change of a setting."""
    assert (ROOT / "docs/kubernetes.md").read_text() == reference()


def test_the_guide_has_knative_take_what_is_rendered() -> None:
    """`docs/kserve.md` turns on the feature flags that predictors need, and no others; the chart's notes name them."""
    predictor_fields = {
        field
        for objects in SETS.values()
        if in_knative_mode(objects)
        for _, predictor in predictors(objects)
        for field in predictor
    }
    assert set(FLAGS) <= predictor_fields
    guide = (ROOT / "docs/kserve.md").read_text()
    assert set(re.findall(r'"(kubernetes\.[a-z-]+)": "enabled"', guide)) == set(FLAGS.values())
    notes = (ROOT / "deploy/chart/templates/NOTES.txt").read_text()
    assert set(re.findall(r"kubernetes\.[a-z-]+", notes)) == set(FLAGS.values())


def test_canaries_in_both_ways() -> None:
    """Standard mode lists the canary, Knative takes it as the predictor; each has pools of its own."""
    standard, knative = SETS["standard-kuberay canary"], SETS["knative-kuberay canary"]
    assert [item["metadata"]["name"] for item in of(standard, "RayCluster")] == ["example-llm-v1", "example-llm-v2"]
    (service,) = of(standard, "InferenceService")
    assert [entry["trafficPercent"] for entry in service["spec"]["canary"]] == [10]
    (service,) = of(knative, "InferenceService")
    assert service["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert service["spec"]["predictor"]["labels"]["baton-revision"] == "v2"
    (route,) = of(SETS["route canary istio=False"], "HTTPRoute")
    weights = {ref["name"]: ref["weight"] for ref in route["spec"]["rules"][0]["backendRefs"]}
    assert weights == {"example-llm-predictor": 95, "example-llm-canary-predictor": 5}
    assert len(list(predictors(SETS["route canary istio=True"]))) == 2


def test_a_revision_is_what_it_is_made_of() -> None:
    """Without a name: other weights, engine arguments or image are another revision; a front end's limits are not."""
    base = changed("standard-kuberay", revision=None)

    def name(data: dict[str, Any]) -> str:
        return str(of(render(parse(data)), "RayCluster")[0]["metadata"]["name"])

    assert re.fullmatch(r"example-llm-[0-9a-f]{8}", name(base))
    assert name({**base, "front_end": {"max_requests": 9}}) == name(base)
    others = [
        changed("standard-kuberay", revision=None, image="x:2"),
        changed("standard-kuberay", **{**CANARY, "revision": None}),
    ]
    others.append({**base, "engine_args": {**base["engine_args"], "max_model_len": 4096}})
    assert len({name(base), *(name(other) for other in others)}) == 4


@pytest.mark.parametrize(
    ("kubernetes", "says"),
    [
        ({"imag": "x"}, "did you mean `image`"),
        ({"mode": "knative", "predictor": {"autoscaler": "keda"}}, "Knative scales the predictor itself"),
        ({"predictor": {"min_replicas": 0}}, "needs mode `knative`"),
        ({"prefill": {"min_replicas": 3, "max_replicas": 2}}, "prefill.min_replicas is over"),
        ({"local_model_cache": CACHE}, "local_model_cache needs model_uri"),
        ({"name": "n" * 30, "revision": "r" * 20, "pools": "rayservice"}, "46 characters at most"),
        ({"name": "Not-A-Name"}, "kubernetes.name"),
    ],
)
def test_contradictions_are_told(kubernetes: dict[str, Any], says: str, tmp_path: Path, capsys: Any) -> None:
    """`baton manifest` says what is wrong with a cluster's settings, and prints nothing."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"kubernetes": kubernetes}))
    assert main(["manifest", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err


def test_the_command_prints_what_is_rendered(tmp_path: Path, capsys: Any) -> None:
    """`baton manifest --config FILE`, with a canary."""
    paths = [tmp_path / name for name in ("stable.yaml", "canary.yaml")]
    paths[0].write_text(yaml.safe_dump(PRESETS["standard-keda"], sort_keys=False))
    paths[1].write_text(yaml.safe_dump(changed("standard-keda", **CANARY), sort_keys=False))
    assert main(["manifest", "--config", str(paths[0]), "--canary", str(paths[1]), "--percent", "10"]) == 0
    assert capsys.readouterr().out == to_yaml(SETS["standard-keda canary"])


def test_a_canary_that_is_none() -> None:
    """The same revision twice, or another service, is refused."""
    with pytest.raises(ConfigError, match="same revision"):
        render(config("standard-kuberay"), config("standard-kuberay"), 10)
    with pytest.raises(ConfigError, match=r"kubernetes\.name differs"):
        render(config("standard-kuberay"), parse(changed("standard-kuberay", name="other", **CANARY)), 10)
