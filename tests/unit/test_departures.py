"""Who leaves when a pool shrinks: the choice, and that Ray Serve's scheduler makes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_scheduler import DeploymentScheduler

from runtime import departures
from runtime.departures import least_needed

OLD_NEW = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("chosen", "needed", "leaving"),
    [
        ({"c"}, {"a": 0.0, "b": 50.0, "c": 900.0}, {"a"}),  # and not the newest, whose KV is needed most
        ({"b", "c"}, {"a": 0.0, "b": 50.0, "c": 900.0}, {"a", "b"}),
        ({"c"}, {"a": 0.0, "b": 0.0, "c": 0.0}, {"c"}),  # all alike: Serve's choice
        ({"starting"}, {"a": 0.0, "b": 50.0, "c": 900.0}, {"starting"}),  # has no KV at all
        ({"starting", "c"}, {"a": 7.0, "b": 50.0, "c": 900.0}, {"starting", "a"}),
        ({"c"}, {"a": 0.0, "c": 900.0}, {"c"}),  # nobody knows of b: Serve's choice
        ({"a", "b", "c"}, {"a": 0.0, "b": 50.0, "c": 900.0}, {"a", "b", "c"}),
        (set(), {"a": 0.0, "b": 50.0, "c": 900.0}, set()),
    ],
)
def test_least_needed(chosen: set[str], needed: dict[str, float], leaving: set[str]) -> None:
    """As many as Serve has chosen, of those that run those whose KV is needed least."""
    assert least_needed(OLD_NEW, chosen, needed) == leaving


class Nodes:
    """As much of Serve's view of the nodes as its scheduler asks here: one node, the head."""

    def get_node_labels(self, node_id: str) -> dict[str, str]:
        """None."""
        return {}


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serve's own scheduler with three running replicas of two deployments. Its class is as it was afterwards."""
    monkeypatch.setattr(DeploymentScheduler, "_get_replicas_to_stop", DeploymentScheduler._get_replicas_to_stop)
    monkeypatch.setattr(departures, "_needed", {})
    found = DeploymentScheduler(Nodes(), "head", create_placement_group_fn=lambda request: None)  # type: ignore[arg-type]
    for name in ("decode", "other"):
        pool = DeploymentID(name, "app")
        found._deployments[pool] = SimpleNamespace(label_selector=None, bundle_label_selector=None)
        for replica in OLD_NEW:
            found._running_replicas[pool][ReplicaID(replica, pool)] = "head"
    return found


def test_serves_scheduler_lets_the_least_needed_go(scheduler: Any) -> None:
    """Of a pool that has told; every other deployment, and a pool that does not tell any more, keeps Serve's choice."""
    pool, other = DeploymentID("decode", "app"), DeploymentID("other", "app")
    replicas = {name: ReplicaID(name, pool) for name in OLD_NEW}
    assert scheduler._get_replicas_to_stop(pool, 1) == {replicas["c"]}
    departures.post("app", "decode", {replicas["a"]: 800.0, replicas["b"]: 0.0, replicas["c"]: 900.0})
    assert scheduler._get_replicas_to_stop(pool, 1) == {replicas["b"]}
    assert scheduler._get_replicas_to_stop(pool, 2) == {replicas["a"], replicas["b"]}
    assert scheduler._get_replicas_to_stop(other, 1) == {ReplicaID("c", other)}
    departures.post("app", "decode", {})
    assert scheduler._get_replicas_to_stop(pool, 1) == {replicas["c"]}
