"""`baton canary` on a real Prometheus that scrapes five revisions under simulated traffic."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from kserve_adapter.canary.command import EXIT, NO_EVIDENCE
from kserve_adapter.canary.judge import Verdict
from kserve_adapter.canary.prometheus import Prometheus
from tests.canary.scraped import baton_canary, prometheus
from tests.conftest import free_port

BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
WATCH_S = 90
REVISIONS: dict[str, dict[str, float]] = {
    "stable": {},
    "good": {},
    "failing": {"error": 0.05},
    "late": {"ttft": 0.6},
    "slow": {"speed": 25.0},
    "idle": {"requests": 0},
}


class Revision:
    """A front end's metrics under vLLM's names, and traffic that moves them."""

    def __init__(self, name: str, *, error: float = 0.0, ttft: float = 0.15, speed: float = 40.0, requests: float = 30):
        self.port = free_port()
        self._chance = random.Random(name)
        self._error, self._ttft, self._speed, self._requests = error, ttft, speed, int(requests)
        registry = CollectorRegistry()
        self._ended = Counter("vllm:request_success", "x", ["finished_reason"], registry=registry)
        self._tokens = Counter("vllm:generation_tokens", "x", registry=registry)
        self._first = Histogram("vllm:time_to_first_token_seconds", "x", buckets=BUCKETS, registry=registry)
        self._gaps = Histogram("vllm:inter_token_latency_seconds", "x", buckets=BUCKETS, registry=registry)
        self._decode = Histogram("vllm:request_decode_time_seconds", "x", registry=registry)
        self._server, _ = start_http_server(self.port, "127.0.0.1", registry)

    def tick(self) -> None:
        """A fifth of a second of traffic."""
        for _ in range(self._requests):
            failed = self._chance.random() < self._error
            self._ended.labels("error" if failed else "length").inc()
            self._first.observe(self._ttft * self._chance.lognormvariate(0, 0.3))
            self._gaps.observe(0.02 * self._chance.lognormvariate(0, 0.2))
            self._tokens.inc(50)
            self._decode.observe(50 / self._speed * self._chance.lognormvariate(0, 0.1))

    def close(self) -> None:
        """No more scrapes."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has watched all revisions for a while."""
    revisions = {name: Revision(name, **how) for name, how in REVISIONS.items()}
    over = threading.Event()
    traffic = threading.Thread(target=drive, args=(list(revisions.values()), over))
    ports = {name: revision.port for name, revision in revisions.items()}
    try:
        with prometheus(tmp_path_factory.mktemp("prometheus"), ports, hosts=("127.0.0.1", "localhost")) as url:
            traffic.start()
            time.sleep(WATCH_S)
            yield url
    finally:
        over.set()
        if traffic.ident is not None:
            traffic.join()
        for revision in revisions.values():
            revision.close()


def drive(revisions: list[Revision], over: threading.Event) -> None:
    """Traffic on all revisions until told to stop."""
    while not over.wait(0.2):
        for revision in revisions:
            revision.tick()


MINUTES = ("--minutes", str((WATCH_S - 5) / 60), "--min-minutes", "1")


@pytest.mark.parametrize(
    ("canary", "verdict", "reason"),
    [
        ("good", Verdict.PROMOTE, "errors"),
        ("failing", Verdict.ROLLBACK, "errors"),
        ("late", Verdict.ROLLBACK, "p99 TTFT"),
        ("slow", Verdict.ROLLBACK, "throughput"),
        ("idle", Verdict.HOLD, "0 and"),
        ("unknown", Verdict.HOLD, "0 and"),
    ],
)
def test_judge(watched: str, canary: str, verdict: Verdict, reason: str) -> None:
    """The good one is promoted, each bad one rolled back for its own fault, too little evidence is held."""
    status, told, err = baton_canary("judge", watched, canary, *MINUTES)
    assert status == EXIT[verdict], (told, err)
    assert told["verdict"] == verdict.value
    assert told["reasons"][0].startswith(reason), told


def test_what_two_front_ends_tell_counts_once(watched: str) -> None:
    """Each tells what the other has counted, too; evidence is not to double with them."""
    seconds, sent_each_s = 20.0, 30 / 0.2
    server = Prometheus(watched)
    evidence = server.evidence('baton_name="llm",baton_revision="good"', seconds)
    server.close()
    assert 0 < evidence.requests <= 1.2 * seconds * sent_each_s
    assert 0 < sum(evidence.ttft.counts) <= 1.2 * seconds * sent_each_s


def test_watch_ends_at_a_rollback(watched: str) -> None:
    """It looks until it is decided."""
    status, told, err = baton_canary("watch", watched, "failing", "--every-s", "1", "--min-minutes", "1")
    assert status == EXIT[Verdict.ROLLBACK], (told, err)


def test_without_prometheus(watched: str) -> None:
    """No evidence is no verdict."""
    status, told, err = baton_canary("judge", f"http://127.0.0.1:{free_port()}", "good")
    assert status == NO_EVIDENCE and not told and "baton: " in err
