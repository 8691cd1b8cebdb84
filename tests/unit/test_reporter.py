"""A front end's report goes to the scaler, and the scrape of one front end has those of its siblings."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kv_transfer.handoff import Handoff
from kv_transfer.ledger import Ledger
from runtime.client_view import ClientView
from runtime.fleet_metrics import FleetMetrics
from runtime.metrics import WORKERS_LOST
from runtime.policy.demand import PoolLoad
from runtime.policy.scaling_records import Answer, FleetLoad, PoolAnswer
from runtime.policy.types import Snapshot
from runtime.pool_metrics import PoolMetrics, fleet_snapshot
from runtime.reporter import Reporter
from runtime.reports import FleetStatus, FrontEndReport
from runtime.scaling_board import BELIEVED_S

GIVEN = {"prefill": 1, "decode": 2}


def cluster() -> Any:
    """A cluster without workers in which three requests wait."""
    fleet = SimpleNamespace(snapshot=lambda: Snapshot((), ()), workers={}, events=())
    ledger = SimpleNamespace(pinned_blocks=Counter, oldest_s=lambda: 0.0)
    return SimpleNamespace(fleet=fleet, ledger=ledger, seen=ClientView(), waiting=lambda: (3, 900))


def status(workers: int) -> FleetStatus:
    """The scaler wants so many workers in each pool."""
    answer = PoolAnswer(workers, "idle", "")
    return FleetStatus(FleetLoad(0.0, PoolLoad(), PoolLoad()), Answer(answer, answer), scaled=True)


class Handle:
    """The scaler's deployment."""

    def __init__(self, answer: FleetStatus | None) -> None:
        self.answer = answer
        self.came: list[FrontEndReport] = []
        self.report = SimpleNamespace(remote=self._report)

    async def _report(self, report: FrontEndReport) -> FleetStatus | None:
        self.came.append(report)
        if self.answer is None:
            raise ConnectionError("it is being replaced")
        return self.answer


@pytest.mark.parametrize(("workers", "sleeps"), [(0, True), (1, False)])
async def test_pools_that_sleep_on_purpose_are_healthy(workers: int, sleeps: bool) -> None:
    """No workers because the scaler wants none: a request has to get through to wake them."""
    handle = Handle(status(workers))
    reporter = Reporter("a", cluster(), handle, GIVEN)  # type: ignore[arg-type]
    reporter.start()
    while reporter.status is None:
        await asyncio.sleep(0)
    reporter.stop()
    assert handle.came[0].waiting == 3
    assert reporter.sleeps(60) is sleeps
    assert not reporter.sleeps(0)


async def test_the_last_answer_is_told_as_long_as_ray_serve_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving goes on without the scaler; what KEDA and alerts read is left out once nobody stands for it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("runtime.reporter.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("runtime.reporter.REPORT_S", 0.0)
    handle, registry = Handle(status(2)), CollectorRegistry()
    reporter = Reporter("a", cluster(), handle, GIVEN)  # type: ignore[arg-type]
    registry.register(PoolMetrics(cluster(), reporter))  # type: ignore[arg-type]

    async def seen() -> tuple[bool, float | None, list[str]]:
        """The same after some reports more: whether there is a status, and what is told of it."""
        upto = len(handle.came) + 3
        while len(handle.came) < upto:
            await asyncio.sleep(0)
        pools = list(fleet_snapshot(cluster(), reporter)["pools"])
        told = registry.get_sample_value("baton_pool_desired_replicas", {"pool": "decode"})
        return reporter.status == status(2), told, pools

    reporter.start()
    assert await seen() == (True, 2.0, ["prefill", "decode"])
    handle.answer = None
    clock.now += BELIEVED_S
    assert await seen() == (True, 2.0, ["prefill", "decode"])
    clock.now += 1.0
    assert await seen() == (True, None, [])
    assert registry.get_sample_value("baton_pool_workers", {"pool": "decode", "state": "ready"}) == 0.0
    handle.answer = status(2)
    assert await seen() == (True, 2.0, ["prefill", "decode"])
    reporter.stop()


async def test_alone_a_front_end_tells_what_there_should_be() -> None:
    """Without a scaler the answer is what the settings give, and says that nobody scales: a dead pool is missed."""
    reporter = Reporter("a", cluster(), None, GIVEN)
    reporter.start()
    while reporter.status is None:
        await asyncio.sleep(0)
    reporter.stop()
    assert reporter.status.load.decode.workers == 0
    assert (reporter.status.answer.prefill.workers, reporter.status.answer.decode.workers) == (1, 2)
    assert not reporter.status.scaled
    assert reporter.status.load.waiting == 3


async def test_a_scrape_has_all_front_ends_and_workers() -> None:
    """Whoever does not answer is left out; each line tells where it is from."""
    texts = {1: "# HELP x x\n# TYPE x gauge\nx 1\n", 2: "# HELP x x\n# TYPE x gauge\nx 2\n"}

    async def fetch(host: str, port: int) -> str:
        if port not in texts:
            raise ConnectionRefusedError
        return texts[port]

    workers = [
        SimpleNamespace(engine_id="w1", role="decode", kv_host="h", metrics_port=2),
        SimpleNamespace(engine_id="w2", role="decode", kv_host="h", metrics_port=9),
        SimpleNamespace(engine_id="w3", role="decode", kv_host="h", metrics_port=0),
    ]
    siblings = [("me", "h", 5), ("other", "h", 1)]
    app = FleetMetrics(lambda: workers, lambda: siblings, "me", fetch)  # type: ignore[arg-type,return-value]
    WORKERS_LOST.labels(pool="decode")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app({}, None, send)  # type: ignore[arg-type]
    text = sent[1]["body"].decode()
    assert 'x{front_end="other"} 1' in text
    assert 'x{worker="w1",pool="decode"} 2' in text
    assert 'baton_workers_lost_total{front_end="me",pool="decode"}' in text
    assert "w2" not in text
    assert "w3" not in text


def test_pinned_blocks_are_those_of_outstanding_handoffs() -> None:
    """Of all cache groups; a handoff without blocks pins none, and one that was pulled none any more."""
    ledger = Ledger(lambda _: None, lambda _: None)
    handoffs = [
        Handoff({"remote_engine_id": "p", "remote_request_id": str(n), "remote_block_ids": blocks})
        for n, blocks in enumerate(([[1, 2], [3]], [], [[4]]))
    ]
    for handoff in handoffs:
        ledger.open(handoff)
    assert ledger.pinned_blocks() == Counter(p=4)
    ledger.pulled(handoffs[0])
    assert ledger.pinned_blocks() == Counter(p=1)
