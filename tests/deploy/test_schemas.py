"""Every manifest of every preset by schema, and that a wrong field of each kind is noticed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.mutation import RUNTIME, WORKERS, Mutations, put
from tests.deploy.rendered import SETS, fresh
from tests.deploy.schemas import CRDS, is_custom, needs_crds, problems


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


SCHEMA_MUTATIONS: Mutations = {
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
