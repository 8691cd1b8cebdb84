"""A predictor's life: starting, joining a cluster with others, losing its workers, draining, leaving."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.conftest import MODEL, free_port, wait_for
from tests.kserve.conftest import REAL, SETTINGS, START_S, Predictor, RayCluster, predictor

pytestmark = pytest.mark.timeout(3600)  # every wait below has a bound of its own
simulated = pytest.mark.skipif(REAL, reason="says nothing about engines: run it on simulated ones")

SLOW = SETTINGS if REAL else {**SETTINGS, "simulator": {"step_base_s": 0.05}}
TOKENS = 150
SOON_S = 50.0
"""A stream of so many tokens, and a cluster that ends in good order; one that is killed takes a minute more."""


class Stream(threading.Thread):
    """A client that reads a stream; what became of it."""

    def __init__(self, running: Predictor, tokens: int) -> None:
        super().__init__()
        self._running, self._tokens = running, tokens
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        """Read to the end, whichever it is."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": self._tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        asked = self._running.client.stream("POST", "/openai/v1/completions", json=body)
        with suppress(httpx.HTTPError), asked as response:
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                self.begun.set()

    def whole(self) -> bool:
        """Whether it ended as it should, with all of its tokens."""
        self.join(60)
        if self.lines[-1:] != ["data: [DONE]"]:
            return False
        usage = json.loads(self.lines[-2].removeprefix("data: "))["usage"]
        return bool(usage["completion_tokens"] == self._tokens)


def refuses_while_starting(running: Predictor) -> None:
    """It answers before it can serve: alive, not ready by any probe, with a typed refusal."""
    assert wait_for(lambda: running.status("/") == 200, START_S), running.told()
    for probe in (f"/v2/models/{MODEL}/ready", "/v2/health/ready"):
        assert running.status(probe) == 503
    assert running.status("/v2/health/live") == 200
    early = running.client.get("/openai/v1/models")
    assert early.status_code == 503 and early.json()["error"]["code"] == "starting"
    body = {"instances": ["x"]}
    assert running.client.post(f"/v1/models/{MODEL}:predict", json=body).status_code == 503


def is_not_ready_without_decode_workers(running: Predictor) -> None:
    """Readiness goes with the only decode worker, and comes back with the next one."""
    before = running.pids("decode")
    assert len(before) == 1
    os.kill(before[0], signal.SIGKILL)
    assert wait_for(lambda: running.status(f"/v2/models/{MODEL}/ready") == 503, 30), running.told()
    assert running.status("/v2/health/live") == 200
    assert wait_for(running.ready, START_S), running.told()
    assert running.pids("decode") != before
    body = {"instances": ["x"]}
    assert running.client.post(f"/v1/models/{MODEL}:predict", json=body).status_code == 200


def drains(running: Predictor) -> None:
    """SIGTERM takes no new request and lets a stream end; then the predictor ends, with status 0."""
    reading = Stream(running, TOKENS)
    assert reading.begun.wait(60), running.told()
    assert running.terminate() == 0, running.told()
    assert reading.whole(), reading.lines[-3:]
    assert running.status("/") == 0


def test_a_predictor_of_its_own(folder: Path) -> None:
    """Everything in one pod: starting, without its decode worker, draining, and nothing is left."""
    with predictor(folder, SLOW, "--grace_period", "120") as running:  # which fails if a process is left behind
        refuses_while_starting(running)
        running.wait_until_ready()
        is_not_ready_without_decode_workers(running)
        began = time.monotonic()
        drains(running)
        assert time.monotonic() - began < SOON_S, running.told()


@simulated
def test_predictors_share_their_revisions_application(folder: Path, ray_cluster: RayCluster) -> None:
    """Two that start at once deploy one application; it serves while one is left, and goes when none is."""
    options = ("--linger_s", "3", "--grace_period", "60")
    with (
        predictor(folder, SLOW, *options, cluster=ray_cluster) as first,
        predictor(folder, SLOW, *options, cluster=ray_cluster) as second,
    ):
        refuses_while_starting(first)
        for running in (first, second):
            running.wait_until_ready()
        assert len(first.pids("prefill")) == len(first.pids("decode")) == 1
        (name,) = ray_cluster.applications()
        assert ray_cluster.nodes() == 3

        drains(second)
        assert wait_for(lambda: ray_cluster.nodes() == 2, 30)

        assert first.ready()
        time.sleep(6)  # longer than an application outlives its last predictor: it has not seen its last one
        is_not_ready_without_decode_workers(first)
        assert ray_cluster.applications() == [name]
        assert first.terminate() == 0, first.told()
    assert wait_for(lambda: not ray_cluster.applications(), 120)
    assert ray_cluster.nodes() == 1


@simulated
def test_a_killed_predictor_takes_its_application_along(folder: Path, ray_cluster: RayCluster) -> None:
    """It said no goodbye: the keeper misses its heartbeats."""
    with predictor(folder, SETTINGS, "--linger_s", "1", cluster=ray_cluster) as running:
        running.wait_until_ready()
        assert len(ray_cluster.applications()) == 1
        running.process.kill()
        running.process.wait(30)
    assert wait_for(lambda: not ray_cluster.applications(), 240)


@simulated
def test_a_stream_longer_than_the_grace_period_is_cut(folder: Path) -> None:
    """SIGTERM ends a predictor within its grace period, whatever its clients do."""
    with predictor(folder, SLOW, "--grace_period", "2") as running:
        running.wait_until_ready()
        reading = Stream(running, 5000)
        assert reading.begun.wait(60), running.told()
        assert running.terminate() == 0, running.told()
        assert not reading.whole()


@simulated
def test_a_predictor_without_a_cluster_can_be_stopped(folder: Path) -> None:
    """No head answers: not ready, and SIGTERM ends it at once instead of after the wait for one."""
    with predictor(folder, SETTINGS, "--ray_address", f"127.0.0.1:{free_port()}") as running:
        assert wait_for(lambda: running.status("/") == 200, START_S), running.told()
        assert not running.ready()
        started = time.monotonic()
        assert running.terminate() == 0, running.told()
        assert time.monotonic() - started < 60


@simulated
def test_a_start_that_fails_ends(folder: Path) -> None:
    """An engine that can't start makes the predictor exit with its reason, so that the pod is seen to fail."""
    settings = {**SETTINGS, "engine": "vllm", "engine_args": {"max_model_len": -5}}
    with predictor(folder, settings) as running:
        assert running.process.wait(START_S) == 1
        assert "the start failed" in running.log.read_text()


@simulated
@pytest.mark.parametrize("option", [("--model_dir", "/nowhere"), ("--application", "Not A Name")])
def test_wrong_arguments_are_told(folder: Path, option: tuple[str, str]) -> None:
    """Exit status 2 and one line that says what is wrong."""
    with predictor(folder, SETTINGS, *option) as running:
        assert running.process.wait(START_S) == 2
        assert "kserve_adapter: " in running.told() and "Traceback" not in running.told()
