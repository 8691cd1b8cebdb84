"""A worker that is to go is let go of once nobody needs it; one that dies is lost once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kv_transfer.engine import EngineFacts
from kv_transfer.ledger import Ledger
from runtime.fleet import Fleet
from runtime.metrics import WORKERS_LOST
from runtime.worker import State
from tests.unit.test_ledger import handoff
from tests.unit.test_link import Handle, until

PREFILL = EngineFacts("p", "prefill", "m", "auto", "auto", 16, 1, 8192, 100, "127.0.0.1", 1)


@pytest.fixture
async def pool() -> AsyncIterator[tuple[Fleet, Ledger]]:
    """A fleet with one prefill worker, and the ledger of what that one holds."""
    fleet: Fleet
    ledger = Ledger(lambda handoff: None, lambda handoff: fleet.settled(handoff))
    handles: Any = {"prefill": Handle(), "decode": Handle()}
    lost: Any = lambda engine_id, why, *, drained: ledger.forget(engine_id)  # noqa: E731
    fleet = Fleet("f", handles, "the token", lambda batch: None, lost, ledger.unsettled, drain_s=600.0)
    fleet._update("prefill", [PREFILL.to_dict()])
    await until(lambda: fleet.in_state(State.WARMING))
    yield fleet, ledger
    fleet.close()


@pytest.mark.parametrize("dies", [True, False])
async def test_it_stays_for_a_pull_that_was_told_to_abort(
    pool: tuple[Fleet, Ledger], monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """Until the decode engine has died, or has had its time to carry the abort out."""
    fleet, ledger = pool
    if not dies:
        monkeypatch.setattr("kv_transfer.ledger.ABORT_S", 0.0)
    aborted = handoff("aborted")
    ledger.open(aborted)
    ledger.entrust(aborted, "d")
    fleet._update("prefill", [])
    assert fleet.workers["p"].state is State.DRAINING
    if dies:
        ledger.forget("d")
        assert not fleet.workers
    await until(lambda: not fleet.workers)


async def test_a_worker_that_dies_is_lost_once(pool: tuple[Fleet, Ledger], monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried again before Ray Serve has noticed."""
    monkeypatch.setattr("runtime.fleet.RECONNECT_S", 0.001)
    fleet, _ = pool
    lost = WORKERS_LOST.labels(pool="prefill")._value
    before, tries = lost.get(), 0

    def dead(*args: Any) -> Any:
        nonlocal tries
        tries += 1
        raise ConnectionError("it is dead")

    fleet._handles["prefill"].outputs.remote = dead  # type: ignore[attr-defined]
    fleet.workers["p"].link.close("it died")
    await until(lambda: tries > 2)
    assert lost.get() == before + 1
    assert [event["what"] for event in fleet.events if "lost" in event["what"]] == ["lost: it died"]
