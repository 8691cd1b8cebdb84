"""Ray Serve's router carries each call to the engine it names, also to one that drains."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import RequestRouter

from runtime import engine_board
from runtime.pinned_router import EngineGone, PinnedRouter


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> PinnedRouter:
    """A router without Ray Serve around it."""
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self, replicas: None)
    monkeypatch.setattr(engine_board, "publish", lambda *_: None)
    router = PinnedRouter.__new__(PinnedRouter)
    router._deployment_id = SimpleNamespace(app_name="a", name="decode")
    router.initialize_state(departed_s=60.0)
    return router


def replica(engine_id: str) -> Any:
    """What Serve says of a replica."""
    return SimpleNamespace(replica_metadata={"engine_id": engine_id})


def call(engine_id: str) -> Any:
    """A handle call that names an engine."""
    return SimpleNamespace(args=[engine_id])


async def test_a_replica_that_was_taken_away_is_still_reached(router: PinnedRouter) -> None:
    """Aborts and signs of life get through while it drains; after its time it is gone."""
    a, b = replica("a"), replica("b")
    router.update_replicas([a, b])
    router.update_replicas([b])
    assert await router._choose_replica_for_request(call("a")) is a
    assert await router._choose_replica_for_request(call("b")) is b
    router._departed["a"] = time.monotonic() - 1
    router.update_replicas([b])
    with pytest.raises(EngineGone, match="a"):
        await router._choose_replica_for_request(call("a"))


async def test_a_replica_that_comes_back_does_not_expire(router: PinnedRouter) -> None:
    """Only what stays away for the whole time is forgotten."""
    a = replica("a")
    router.update_replicas([a])
    router.update_replicas([])
    router.update_replicas([a])
    assert not router._departed
    assert await router._choose_replica_for_request(call("a")) is a


async def test_no_second_try(router: PinnedRouter) -> None:
    """A replica that died or refuses is not asked again and again until Serve notices."""
    router.update_replicas([replica("a")])
    with pytest.raises(EngineGone):
        await router._choose_replica_for_request(call("a"), is_retry=True)
