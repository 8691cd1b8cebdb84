"""Which replicas leave when a pool shrinks: those whose KV is needed least.

Ray Serve's controller chooses them (replicas that do not run yet, then those on the emptiest node, then the newest) and
has no interface for a deployment to have a say. The policies that follow the scaler run in the same process, so Baton's
choice is put in front of Serve's here. It is made among the running replicas of a pool when each of them has said
lately how many tokens of its KV are needed; everything else stays Serve's choice.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from ray.serve._private.deployment_scheduler import DeploymentScheduler

logger = logging.getLogger("ray.serve")  # the controller's own

Replica = TypeVar("Replica", bound=Hashable)

_needed: dict[tuple[str, str], Mapping[Any, float]] = {}

_serves_choice = DeploymentScheduler._get_replicas_to_stop


def post(application: str, pool: str, needed: Mapping[Any, float]) -> None:
    """Note how many tokens of KV are needed of each of a pool's replicas."""
    _needed[application, pool] = needed
    DeploymentScheduler._get_replicas_to_stop = _replicas_to_stop


def least_needed(running: Iterable[Replica], chosen: set[Replica], needed: Mapping[Replica, float]) -> set[Replica]:
    """As many replicas as Serve has chosen: the same where they do not run, else those whose KV is needed least.

    Among equals Serve's choice counts.
    """
    candidates = set(running)
    if not candidates <= needed.keys():
        return chosen
    early = chosen - candidates
    order = sorted(candidates, key=lambda replica: (needed[replica], replica not in chosen))
    return early | set(order[: len(chosen) - len(early)])


def _replicas_to_stop(self: Any, deployment_id: Any, max_num_to_stop: int, *args: Any, **kwargs: Any) -> set[Any]:
    """In place of the method of Serve's scheduler."""
    chosen: set[Any] = _serves_choice(self, deployment_id, max_num_to_stop, *args, **kwargs)
    needed = _needed.get((deployment_id.app_name, deployment_id.name))
    if needed is None:
        return chosen
    leaving = least_needed(self._running_replicas[deployment_id], chosen, needed)
    for replica in leaving:
        logger.info("%s leaves: %d tokens of its KV are needed", replica, needed.get(replica, 0))
    return leaving
