"""From reports of front ends to one answer, and to Ray Serve, metrics and the terminal."""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from kv_transfer.load import NEEDED_TOKENS
from runtime import departures, scaling_board
from runtime.brain import Brain
from runtime.cli import main
from runtime.client_view import BOUNDS_S, ClientView, Totals
from runtime.config_file import parse
from runtime.errors import ConfigError
from runtime.policy.scaling_records import PoolBounds, ScalingSettings
from runtime.policy.types import Cost
from runtime.pool_metrics import PoolMetrics, _worker_record
from runtime.reports import FleetStatus, FrontEndReport, WorkerReport
from runtime.scaling_follower import follow
from runtime.top import render

READ, STEP = Cost(0.0, 1e-4), Cost(0.01, 0.001)
NONE = (0,) * (len(BOUNDS_S) + 1)
PREFILL = WorkerReport("p1", "prefill", "ready", num_blocks=100, kv_use=0.5, read=READ)
DECODE = WorkerReport("d1", "decode", "ready", num_blocks=100, kv_use=0.2, read=READ, step=STEP, max_streams=256)
SETTINGS = ScalingSettings(PoolBounds(1, 8), PoolBounds(1, 8), borrow_s=0.0)

GIVEN = {"prefill": 1, "decode": 2}


def told(name: str = "a", *workers: WorkerReport, **changes: Any) -> FrontEndReport:
    """A front end's report."""
    report = FrontEndReport(name, workers or (PREFILL, DECODE), 0, 0, Totals(), NONE, NONE)
    return replace(report, **changes)


def status(brain: Brain, now: float, replicas: dict[str, dict[str, int]] | None = None) -> FleetStatus:
    """A decision that there must be."""
    answer = brain.decide(now, replicas)
    assert answer is not None
    return answer


def test_two_front_ends_are_one_fleet() -> None:
    """A worker that both know counts once; what each waits for, reads and writes is added up."""
    brain = Brain(SETTINGS, GIVEN)
    busy = replace(PREFILL, queued_tokens=2000, queued_requests=2, pinned_blocks=10)
    for now, read in ((0.0, 0), (10.0, 50_000)):
        brain.tell(told("a", busy, DECODE, waiting=1, waiting_tokens=500, totals=Totals(read=read)), now)
        brain.tell(told("b", replace(busy, queued_tokens=1800), DECODE, totals=Totals(read=2 * read)), now)
    load = status(brain, 10.0).load
    assert (load.prefill.ready, load.decode.ready) == (1, 1)
    assert load.prefill.queued_tokens == 2500
    assert load.prefill.queued_requests == 3
    assert load.prefill.arriving_tokens_s == pytest.approx(15_000)
    assert load.prefill.pinned_kv == pytest.approx(0.2)
    assert load.waiting == 1


def test_who_waits_for_a_full_decode_pool_counts_there() -> None:
    """Waiting requests are the need of the pool that they wait for."""
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told("a", PREFILL, replace(DECODE, kv_use=0.95), waiting=7, waiting_tokens=700), 0.0)
    load = status(brain, 0.0).load
    assert (load.prefill.queued_requests, load.decode.queued_requests) == (0, 7)


def test_workers_that_start_are_counted_by_ray_serve() -> None:
    """Replicas that no front end knows yet are on their way; those that stop are not."""
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told("a", PREFILL, DECODE, replace(DECODE, engine_id="d2", state="warming")), 0.0)
    load = status(brain, 0.0, {"decode": {"RUNNING": 2, "STARTING": 3, "STOPPING": 1}, "prefill": {"RUNNING": 1}}).load
    assert (load.decode.ready, load.decode.starting, load.decode.draining) == (1, 4, 1)
    alone = status(brain, 0.0).load
    assert (alone.decode.ready, alone.decode.starting, alone.decode.draining) == (1, 1, 0)


def test_a_silent_front_end_is_forgotten() -> None:
    """Its waiting requests are gone with it; without any there is no answer, so that nothing changes."""
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told("a", waiting=5, waiting_tokens=5), 0.0)
    brain.tell(told("b"), 9.0)
    assert status(brain, 12.0).load.waiting == 0
    assert brain.decide(100.0) is None


def test_latencies_are_of_the_last_minute() -> None:
    """What was slow before does not count any more."""
    slow = tuple(int(bound == 30.0) * 100 for bound in (*BOUNDS_S, 0))
    later = tuple(count + int(bound == 0.1) * 100 for count, bound in zip(slow, (*BOUNDS_S, 0), strict=True))
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told(ttft=slow), 0.0)
    brain.tell(told(ttft=later), 30.0)
    found = status(brain, 30.0).load.ttft_s
    assert found is not None
    assert 0.075 < found <= 0.1


def test_growth_is_answered() -> None:
    """Twenty thousand tokens a second are more than one worker reads."""
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told(), 0.0)
    brain.tell(told(totals=Totals(read=200_000)), 10.0)
    answer = status(brain, 10.0).answer
    assert (answer.prefill.workers, answer.decode.workers) == (3, 1)


def test_deciding_for_a_hundred_workers_costs_little() -> None:
    """A decision a second may take 1% of a core: 10 ms, with the report that it takes in."""
    workers = [replace(worker, engine_id=f"{worker.pool}{n}") for worker in (PREFILL, DECODE) for n in range(50)]
    brain, best = Brain(SETTINGS, GIVEN), 1.0
    for second in range(100):
        started = time.process_time()
        brain.tell(told("a", *workers), float(second))
        brain.decide(float(second))
        best = min(best, time.process_time() - started)
    assert best < 0.01


def test_without_scaling_the_settings_say_what_there_should_be() -> None:
    """A dead worker is missed until it is replaced, a refused one stays missed; more than was given are no fault."""
    brain = Brain(None, GIVEN)
    sizes = {}
    for now, state in enumerate(("gone", "warming", "refused", "ready")):
        workers = [replace(DECODE, engine_id="d2", state=state)] if state != "gone" else []
        brain.tell(told("a", DECODE, *workers), float(now))
        found = status(brain, float(now))
        sizes[state] = (found.load.decode.ready, found.load.decode.starting, found.answer.decode.workers)
        assert (found.load.prefill.workers, found.answer.prefill.workers) == (0, 1)
        assert not found.scaled
    assert sizes == {"gone": (1, 0, 2), "warming": (1, 1, 2), "refused": (1, 0, 2), "ready": (2, 0, 2)}
    brain.tell(told("a", *(replace(DECODE, engine_id=f"d{n}") for n in range(3))), 9.0)
    assert status(brain, 9.0).answer.decode.workers == 3


@dataclass
class Point:
    timestamp: float
    value: float


@dataclass
class Context:
    """As much of Ray Serve's context as the follower reads."""

    deployment_name: str
    app_name: str = "app"
    current_time: float = 1000.0
    target_num_replicas: int = 2
    raw_metrics: dict[str, dict[str, list[Point]]] = field(default_factory=dict)


def test_ray_serve_follows_the_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pools take the last answer; without a fresh one they stay as they are."""
    monkeypatch.setattr(scaling_board, "_answers", {})
    monkeypatch.setattr(departures, "post", lambda *told: None)
    assert follow(Context("decode"))[0] == 2
    series = {"prefill": {"r": [Point(990.0, 3.0), Point(999.0, 5.0)]}, "decode": {"r": [Point(999.0, 0.0)]}}
    assert follow(Context("scaler", raw_metrics=series)) == (1, {})
    assert follow(Context("prefill"))[0] == 5
    assert follow(Context("decode"))[0] == 0
    assert follow(Context("decode", app_name="other"))[0] == 2
    assert follow(Context("decode", current_time=1100.0))[0] == 2


def test_ray_serve_is_told_whose_kv_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last figure of each replica of a pool, and none that is old."""
    posted: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(departures, "post", lambda app, pool, needed: posted.update({(app, pool): needed}))
    series = {NEEDED_TOKENS: {"a": [Point(990.0, 7.0), Point(995.0, 9.0)], "b": [Point(900.0, 7.0)], "c": []}}
    follow(Context("decode", raw_metrics=series))
    follow(Context("prefill"))
    assert posted == {("app", "decode"): {"a": 9.0}, ("app", "prefill"): {}}


def _status() -> FleetStatus:
    brain = Brain(SETTINGS, GIVEN)
    brain.tell(told("a", replace(PREFILL, queued_tokens=2000, queued_requests=2), DECODE), 0.0)
    return status(brain, 0.0)


def test_the_answer_is_exported() -> None:
    """The figures that KEDA and people follow are those of the decision."""
    cluster: Any = SimpleNamespace(
        fleet=SimpleNamespace(workers={}), seen=ClientView(), ledger=SimpleNamespace(oldest_s=lambda: 1.5)
    )
    registry = CollectorRegistry()
    registry.register(PoolMetrics(cluster, SimpleNamespace(believed=_status)))  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    assert 'baton_pool_desired_replicas{pool="prefill"} 1.0' in text
    assert 'baton_pool_queue_depth{pool="prefill"} 2.0' in text
    assert 'baton_pool_backlog_seconds{pool="prefill"} 0.2' in text
    assert 'baton_pool_reason{pool="prefill",reason="steady"} 1.0' in text
    assert "baton_handoff_oldest_seconds 1.5" in text


def test_top_shows_the_fleet() -> None:
    """Pools with what they have and should have, workers, and what happened lately."""
    now = _status()
    snapshot = {
        "pools": {
            pool: {
                "load": {**asdict(getattr(now.load, pool)), "backlog_s": getattr(now.load, pool).backlog_s},
                "answer": asdict(getattr(now.answer, pool)),
                "scaled": True,
            }
            for pool in ("prefill", "decode")
        },
        "workers": [_worker_record(PREFILL), _worker_record(DECODE)],
        "waiting": {"requests": 4, "tokens": 99},
        "latency": {"ttft_s": 0.25, "itl_s": None},
        "refusals": {"overloaded": 3.0},
        "recent": [{"at": 0.0, "pool": "decode", "engine_id": "d0", "what": "lost: its output stream broke"}],
    }
    shown = _shown(snapshot)
    for words in (
        "4 requests wait",
        "overloaded 3",
        "first token 250 ms",
        "200 ms",
        "lost: its output",
        "p1",
        "20%",
        "steady",
    ):
        assert words in shown


def test_top_shows_a_pool_that_lacks_a_worker() -> None:
    """Also where nobody scales: what there is beside what there should be."""
    brain = Brain(None, GIVEN)
    brain.tell(told("a", DECODE), 0.0)
    found = status(brain, 0.0)
    pool = {"load": {**asdict(found.load.decode), "backlog_s": 0.0}, "answer": asdict(found.answer.decode)}
    snapshot = {
        "pools": {"decode": {**pool, "scaled": found.scaled}},
        "workers": [],
        "waiting": {"requests": 0, "tokens": 0},
        "latency": {"ttft_s": None, "itl_s": None},
        "refusals": {},
        "recent": [],
    }
    (row,) = [line for line in _shown(snapshot).splitlines() if "not scaled" in line]
    assert [cell.strip() for cell in row.split("│")][1:6] == ["decode", "1", "0", "0", "2"]


def _shown(snapshot: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(json.loads(json.dumps(snapshot))))
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    return shown


def test_top_says_when_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the address, not a traceback."""
    assert main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "no front end of Baton at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scaling", "pools"),
    [
        ({}, None),
        ({"decode": {"max": 4}}, ((2, 2), (2, 4))),
        ({"prefill": {"min": 0}, "decode": {"min": 0}}, ((0, 2), (0, 2))),
        ({"rule": "queue_depth"}, ((1, 10), (1, 10))),
        ({"rule": "queue_depth", "decode": {"max": 3}}, ((1, 10), (1, 3))),
    ],
)
def test_bounds_come_from_the_settings(scaling: dict[str, Any], pools: tuple[tuple[int, int], ...] | None) -> None:
    """Off unless a pool may change; the pool's replicas are what it starts with, and the default of both bounds."""
    config = parse({"prefill": {"replicas": 2}, "decode": {"replicas": 2}, "scaling": scaling})
    policy = config.scaling_policy()
    found = policy and ((policy.prefill.least, policy.prefill.most), (policy.decode.least, policy.decode.most))
    assert found == pools


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scaling": {"decode": {"min": 2, "max": 4}}}, "a pool starts within bounds"),
        ({"scaling": {"ratio_min": 2, "ratio_max": 1}}, "ratio_min is above ratio_max"),
        (
            {
                "prefill": {"num_gpus": 1},
                "decode": {"num_gpus": 1},
                "scaling": {"decode": {"max": 2}, "budget_gpus": 1},
            },
            "the smallest pools need 2 GPUs",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    """Refused at the edge, with what is wrong."""
    with pytest.raises(ConfigError, match=words):
        parse(settings)
