"""Handoffs that are outstanding."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import REGISTRY

from kv_transfer.handoff import Handoff
from kv_transfer.ledger import Ledger


def handoff(leg_id: str, engine_id: str = "p") -> Handoff:
    """A finished prefill."""
    where = {"remote_engine_id": engine_id, "remote_request_id": leg_id, "remote_block_ids": [[1]]}
    return Handoff.from_params({"do_remote_prefill": True, **where})


def metric(name: str) -> float:
    """A metric's value now."""
    return REGISTRY.get_sample_value(name) or 0.0


def test_each_handoff_is_settled_once() -> None:
    """Pulled, released or dead: whichever comes first, and the rest changes nothing."""
    released: list[Handoff] = []
    settled: list[Handoff] = []
    ledger = Ledger(released.append, settled.append)
    a, b, c = handoff("a"), handoff("b"), handoff("c", "q")
    before = metric("baton_handoffs_outstanding")
    for each in (a, b, c):
        ledger.open(each)
    assert metric("baton_handoffs_outstanding") == before + 3
    assert ledger.outstanding() == {"p": 2, "q": 1}
    ledger.pulled(a)
    ledger.release(a, "abandoned")
    ledger.release(b, "abandoned")
    ledger.pulled(b)
    ledger.forget("q")
    ledger.release(c, "abandoned")
    assert (released, settled) == ([b], [a, b, c])
    assert metric("baton_handoffs_outstanding") == before


async def test_what_a_dead_decode_engine_was_to_settle_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to abort its pull, and nobody knows whether it did: unless the blocks are dead or it was long ago."""
    released: list[Handoff] = []
    settled: list[Handoff] = []
    ledger = Ledger(released.append, settled.append)
    old, dead, elsewhere, lost = handoff("old"), handoff("dead", "q"), handoff("elsewhere"), handoff("lost")
    before = metric("baton_handoffs_outstanding")
    for each in (old, dead, elsewhere, lost):
        ledger.open(each)
    with monkeypatch.context() as patch:
        patch.setattr("kv_transfer.ledger.ABORT_S", 0.0)
        ledger.entrust(old, "d")
    while ledger.unsettled()["p"] == 3:
        await asyncio.sleep(0)
    ledger.entrust(dead, "d")
    ledger.entrust(elsewhere, "e")
    ledger.entrust(lost, "d")
    assert ledger.outstanding() == {}
    assert (ledger.unsettled(), settled) == ({"p": 2, "q": 1}, [old])
    ledger.forget("q")
    ledger.forget("d")
    ledger.forget("d")
    assert (released, settled) == ([lost], [old, dead, lost])
    assert ledger.unsettled() == {"p": 1}
    assert metric("baton_handoffs_outstanding") == before


def test_the_oldest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handoff that stays tells of a fault: its age is what an alert looks at."""
    ledger = Ledger(lambda handoff: None, lambda handoff: None)
    a, now = handoff("a"), time.monotonic()
    assert ledger.oldest_s() == 0.0
    ledger.open(a)
    monkeypatch.setattr(time, "monotonic", lambda: now + 59.0)
    assert ledger.oldest_s() == pytest.approx(59.0, abs=0.5)
    ledger.release(a, "abandoned")
    assert ledger.oldest_s() == 0.0
