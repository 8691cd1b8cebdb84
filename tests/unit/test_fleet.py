"""A worker that is to go is let go of once nobody needs it, and gets no work meanwhile; one that dies is lost once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.engine import EngineFacts
from kv_transfer.ledger import Ledger
from runtime.fleet import Fleet
from runtime.metrics import WORKERS_LOST
from runtime.worker import State
from tests.unit.test_ledger import handoff
from tests.unit.test_link import Handle, Stream, until

PREFILL = EngineFacts("p", "prefill", "m", "auto", "auto", 16, 1, 8192, 100, "127.0.0.1", 1)
DECODE = replace(PREFILL, engine_id="d", role="decode")


class LateStream(Stream):
    """An output stream that opens when it may."""

    def __init__(self, opens: threading.Event) -> None:
        super().__init__([])
        self._opens = opens

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        """As a stream's, later."""
        while not self._opens.is_set():  # set in another thread than this one, the reader's
            await asyncio.sleep(0.001)
        async for batches in super().__aiter__():
            yield batches


class Prefill(Handle):
    """A prefill pool; its streams open at once unless `opens` is cleared before."""

    def __init__(self) -> None:
        super().__init__()
        self.opens = threading.Event()
        self.opens.set()
        self.outputs = SimpleNamespace(remote=lambda *args: LateStream(self.opens))


@dataclass
class Front:
    """A front end's fleet, without workers at first, and the ledger of what prefill workers hold for it."""

    fleet: Fleet
    ledger: Ledger
    prefill: Prefill

    def announce(self, *engines: EngineFacts) -> None:
        """Ray Serve's news of prefill workers."""
        self.fleet._update("prefill", [facts.to_dict() for facts in engines])

    @property
    def state(self) -> State:
        """Of the prefill worker."""
        return self.fleet.workers["p"].state


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """A front end without workers."""
    fleet: Fleet
    ledger = Ledger(lambda handoff: None, lambda handoff: fleet.settled(handoff))
    prefill = Prefill()
    handles: Any = {"prefill": prefill, "decode": Handle()}
    lost: Any = lambda engine_id, why, *, drained: ledger.forget(engine_id)  # noqa: E731
    fleet = Fleet("f", handles, "the token", lambda batch: None, lost, ledger.unsettled, drain_s=600.0)
    yield Front(fleet, ledger, prefill)
    fleet.close()


@pytest.mark.parametrize("dies", [True, False])
async def test_it_stays_for_a_pull_that_was_told_to_abort(
    front: Front, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """Until the decode engine has died, or has had its time to carry the abort out."""
    fleet, ledger = front.fleet, front.ledger
    front.announce(PREFILL)
    await until(lambda: fleet.in_state(State.WARMING))
    if not dies:
        monkeypatch.setattr("kv_transfer.ledger.ABORT_S", 0.0)
    aborted = handoff("aborted")
    ledger.open(aborted)
    ledger.entrust(aborted, "d")
    front.announce()
    assert front.state is State.DRAINING
    if dies:
        ledger.forget("d")
        assert not fleet.workers
    await until(lambda: not fleet.workers)


async def test_a_worker_that_dies_is_lost_once(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried again before Ray Serve has noticed."""
    monkeypatch.setattr("runtime.fleet.RECONNECT_S", 0.001)
    fleet = front.fleet
    front.announce(PREFILL)
    await until(lambda: fleet.in_state(State.WARMING))
    lost = WORKERS_LOST.labels(pool="prefill")._value
    before, tries = lost.get(), 0

    def dead(*args: Any) -> Any:
        nonlocal tries
        tries += 1
        raise ConnectionError("it is dead")

    front.prefill.outputs.remote = dead
    fleet.workers["p"].link.close("it died")
    await until(lambda: tries > 2)
    assert lost.get() == before + 1
    assert [event["what"] for event in fleet.events if "lost" in event["what"]] == ["lost: it died"]


def drains_before_its_link_is_up(front: Front) -> None:
    """Ray Serve takes a worker away that is being connected anew, while blocks of it may still be pulled."""
    front.prefill.opens.clear()
    front.announce(PREFILL)
    front.ledger.open(handoff("pinned"))
    front.announce()
    assert front.state is State.DRAINING


async def link_is_up(front: Front) -> None:
    """Let the worker's link come up, and who waits for it go on."""
    front.prefill.opens.set()
    await until(front.fleet.workers["p"].link.up.is_set)
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_link_that_comes_up_ends_no_drain(front: Front) -> None:
    """The worker is not warmed, or it would take work until its time is over; once it is announced again it is."""
    drains_before_its_link_is_up(front)
    await link_is_up(front)
    assert front.state is State.DRAINING and not front.fleet.starting()
    front.announce(PREFILL)
    assert front.state is State.WARMING


async def test_it_is_announced_again_before_its_link_is_up(front: Front) -> None:
    """It is connecting, as before, and not to be warmed yet."""
    drains_before_its_link_is_up(front)
    front.announce(PREFILL)
    assert front.state is State.CONNECTING
    await link_is_up(front)
    assert front.state is State.WARMING


async def test_a_refused_worker_that_is_announced_again_is_refused(front: Front) -> None:
    """That Ray Serve lost sight of it makes it fit the other pool no better."""
    front.fleet._update("decode", [DECODE.to_dict()])
    await until(lambda: front.fleet.in_state(State.WARMING))
    other = replace(PREFILL, dtype="float16")
    front.announce(other)
    await until(lambda: front.state is State.REFUSED)
    front.ledger.open(handoff("pinned"))
    front.announce()
    assert front.state is State.DRAINING
    front.announce(other)
    assert front.state is State.REFUSED
