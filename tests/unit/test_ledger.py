"""Handoffs that are outstanding."""

from __future__ import annotations

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


class Release:
    """A decode pool that may be empty."""

    def __init__(self) -> None:
        self.there = True
        self.released: list[Handoff] = []
        self.settled: list[Handoff] = []
        self.ledger = Ledger(self.send, self.settled.append, lease_s=60.0)

    def send(self, handoff: Handoff) -> bool:
        if self.there:
            self.released.append(handoff)
        return self.there


def test_each_handoff_is_settled_once() -> None:
    """Pulled, released or dead: whichever comes first, and the rest changes nothing."""
    pool = Release()
    a, b, c = handoff("a"), handoff("b"), handoff("c", "q")
    before = metric("baton_handoffs_outstanding")
    for each in (a, b, c):
        pool.ledger.open(each)
    assert metric("baton_handoffs_outstanding") == before + 3
    assert pool.ledger.outstanding() == {"p": 2, "q": 1}
    pool.ledger.pulled(a)
    pool.ledger.release(a, "abandoned")
    pool.ledger.release(b, "abandoned")
    pool.ledger.pulled(b)
    pool.ledger.forget("q")
    pool.ledger.release(c, "abandoned")
    assert (pool.released, pool.settled) == ([b], [a, b, c])
    assert metric("baton_handoffs_outstanding") == before


def test_what_nobody_can_release_now_is_released_later() -> None:
    """As soon as there is a decode worker again."""
    pool = Release()
    pool.there = False
    a = handoff("a")
    pool.ledger.open(a)
    pool.ledger.release(a, "abandoned")
    pool.ledger.tidy()
    assert (pool.released, pool.ledger.outstanding()) == ([], {"p": 1})
    pool.there = True
    pool.ledger.tidy()
    assert (pool.released, pool.ledger.outstanding()) == ([a], {})


def test_a_lease_that_had_to_run_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could release it in time: the prefill engine has freed the blocks itself. That is not to happen."""
    pool = Release()
    pool.there = False
    a = handoff("a")
    pool.ledger.open(a)
    pool.ledger.release(a, "abandoned")
    before, now = metric("baton_handoffs_expired_total"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59.0)
    pool.ledger.tidy()
    assert pool.ledger.oldest_s() == pytest.approx(59.0, abs=0.5)
    assert pool.ledger.outstanding() == {"p": 1}
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    pool.ledger.tidy()
    assert (pool.released, pool.ledger.outstanding()) == ([], {})
    assert metric("baton_handoffs_expired_total") == before + 1
    assert pool.ledger.oldest_s() == 0.0
