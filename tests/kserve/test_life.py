"""A predictor's life: starting, joining a cluster with others, losing its workers, draining, leaving."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from tests.conftest import MODEL, wait_for
from tests.kserve.conftest import REAL, SETTINGS, Predictor, predictor

pytestmark = pytest.mark.skipif(REAL, reason="two predictors' worth of real engines don't fit a small machine")

SLOW = {**SETTINGS, "simulator": {"step_base_s": 0.05}}


def applications(address: str) -> dict[str, Any]:
    """The Serve applications of the cluster, by name."""
    ray.init(address=address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    try:
        return dict(serve.status().applications)
    finally:
        ray.shutdown()


def stream(running: Predictor, tokens: int, into: list[str], started: threading.Event) -> None:
    """Read a stream to its end."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with running.client.stream("POST", "/openai/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line:
                into.append(line)
                started.set()


def test_predictors_share_their_revisions_application(folder: Path, ray_head: tuple[str, str]) -> None:
    """Two that start at once deploy one application; it serves while one is left, and goes when none is.

    On the way: not ready while starting, a typed refusal meanwhile, SIGTERM lets a stream end, ready is false without
    decode workers.
    """
    address, mark = ray_head
    options = ("--ray_address", address, "--linger_s", "3", "--grace_period", "60")
    with (
        predictor(folder, SLOW, *options, mark=mark) as first,
        predictor(folder, SLOW, *options, mark=mark) as second,
    ):
        assert wait_for(lambda: first.status("/") == 200, 120), first.told()
        assert first.status(f"/v2/models/{MODEL}/ready") == 503
        assert first.status("/v2/health/ready") == 503
        early = first.client.get("/openai/v1/models")
        assert early.status_code == 503 and early.json()["error"]["code"] == "starting"
        for running in (first, second):
            running.wait_until_ready()
        assert len(first.pids("prefill")) == len(first.pids("decode")) == 1

        lines: list[str] = []
        started = threading.Event()
        reader = threading.Thread(target=stream, args=(second, 150, lines, started))
        reader.start()
        assert started.wait(30)
        assert second.terminate() == 0, second.told()
        reader.join(30)
        assert lines[-1] == "data: [DONE]" and len(lines) > 100
        assert not second.ready()

        assert first.ready()
        (name,) = applications(address)
        for pid in first.pids("decode"):
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: first.status(f"/v2/models/{MODEL}/ready") == 503, 10)
        assert wait_for(first.ready, 120), first.told()
        body = {"instances": ["x"]}
        assert first.client.post(f"/v1/models/{MODEL}:predict", json=body).status_code == 200
        assert list(applications(address)) == [name]
        assert first.terminate() == 0, first.told()
    assert wait_for(lambda: not applications(address), 60)


def test_a_stream_longer_than_the_grace_period_is_cut(folder: Path) -> None:
    """SIGTERM ends a predictor within its grace period, whatever its clients do."""
    with predictor(folder, SLOW, "--grace_period", "2") as running:
        running.wait_until_ready()
        lines: list[str] = []
        started = threading.Event()

        def read() -> None:
            with pytest.raises(Exception, match=r"."):
                stream(running, 5000, lines, started)
                raise ConnectionError("the stream ended without its last event" if "[DONE]" not in lines[-1] else "")

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(30)
        assert running.terminate() == 0, running.told()
        reader.join(10)
        assert "data: [DONE]" not in lines


def test_a_start_that_fails_ends(folder: Path) -> None:
    """An engine that can't start makes the predictor exit with its reason, so that the pod is seen to fail."""
    settings = {**SETTINGS, "engine": "vllm", "engine_args": {"max_model_len": -5}}
    with predictor(folder, settings) as running:
        assert running.process.wait(300) == 1
        assert "the start failed" in running.told()
        running.process.returncode = 0


@pytest.mark.parametrize("option", [("--model_dir", "/nowhere"), ("--application", "Not A Name")])
def test_wrong_arguments_are_told(folder: Path, option: tuple[str, str]) -> None:
    """Exit status 2 and one line that says what is wrong."""
    with predictor(folder, SETTINGS, *option) as running:
        assert running.process.wait(120) == 2
        assert "kserve_adapter: " in running.told() and "Traceback" not in running.told()
