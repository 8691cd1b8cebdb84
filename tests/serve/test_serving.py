"""Baton on real Ray Serve with simulated engines: several workers a pool, keys, disconnects, deaths."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import MODEL, Server, marked, wait_for
from tests.pools import Pools
from tests.serve.conftest import KEY

PROMPT = list(range(2000, 2300))
RECOVERY_S = 60.0


def text(server: Server, prompt: list[int], **params: object) -> str:
    """The text of a greedy completion."""
    answer = server.complete(prompt, temperature=0, **params)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    return str(choice["text"])


def test_text_is_that_of_one_engine(server: Server) -> None:
    """Through both pools, or whole on a decode worker: the simulated model says the same."""
    assert text(server, PROMPT, max_tokens=16) == text(server, PROMPT, max_tokens=16, prompt_logprobs=0)


def test_every_worker_works(server: Server, pools: Pools) -> None:
    """Concurrent requests spread over both workers of both pools as soon as all of them are warm."""

    def burst() -> bool:
        before = {role: pools.states(role) for role in ("prefill", "decode")}
        with ThreadPoolExecutor(16) as threads:
            texts = list(threads.map(lambda i: text(server, [*PROMPT, i], max_tokens=32), range(32)))
        assert len(set(texts)) == len(texts)
        pulls = [state["pulls"] - before["decode"][engine]["pulls"] for engine, state in pools.states("decode").items()]
        reads = [
            state["prompt_tokens_computed"] - before["prefill"][engine]["prompt_tokens_computed"]
            for engine, state in pools.states("prefill").items()
        ]
        assert sum(pulls) >= 32
        pools.wait_until_free(5)
        return len(pulls) == len(reads) == 2 and min(*pulls, *reads) > 0

    assert wait_for(burst, RECOVERY_S)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize"])
def test_without_a_key_nothing(server: Server, path: str) -> None:
    """With configured keys, only probes and metrics are open."""
    body = {"model": MODEL, "prompt": "x"}
    response = httpx.request("GET" if path == "/v1/models" else "POST", server.url + path, json=body)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "unauthorized"
    assert httpx.get(server.url + "/health").status_code == 200
    assert "baton_plans_total" in httpx.get(server.url + "/metrics").text


def test_keys_are_not_in_the_logs(server: Server) -> None:
    """No log of Baton, Ray Serve or Ray has the key in it."""
    server.complete(PROMPT, max_tokens=1)
    logs = [path for path in Path("/tmp/ray/session_latest/logs").rglob("*") if path.is_file()]
    assert any("front-end" in path.name for path in logs)
    assert not [path for path in logs if KEY.encode() in path.read_bytes()]
    assert KEY not in "\n".join(server.lines)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit(server: Server, declared: bool) -> None:
    """413 by the declared length, or as soon as too much has come."""
    body = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    content = body if declared else iter([body[:50_000], body[50_000:]])
    response = server.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_a_client_that_leaves_holds_nothing(server: Server, pools: Pools, lines: int) -> None:
    """Disconnects before the first token, after it, and later; the fixture checks the blocks."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2000, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for _ in zip(range(lines), response.iter_lines(), strict=False):
            pass
    assert not pools.wait_until_free(1)


@pytest.mark.parametrize(
    ("role", "how"), [("prefill", signal.SIGKILL), ("decode", signal.SIGKILL), ("decode", signal.SIGTERM)]
)
def test_a_killed_worker_is_replaced_and_no_new_request_fails(
    server: Server, pools: Pools, role: str, how: signal.Signals
) -> None:
    """A replica's process ends: what comes next goes to the other one, and soon there are two again."""
    killed = server.pids(role)[0]
    engines = set(pools.engines(role))
    os.kill(killed, how)
    prompts = [[*PROMPT, 100 + i] for i in range(20)]
    for prompt in prompts:
        assert text(server, prompt, max_tokens=4)
    assert wait_for(lambda: len(set(pools.engines(role)) - engines) == 1, RECOVERY_S)
    assert wait_for(lambda: len(server.pids(role)) == 2 and killed not in server.pids(role), RECOVERY_S)
    assert text(server, PROMPT, max_tokens=4)


def test_prefill_deaths_are_not_noticed(server: Server, pools: Pools) -> None:
    """Requests that wait for a prefill when its worker is killed are planned again and answered right."""
    prompts = [[*range(3000 + i, 7000 + i)] for i in range(12)]
    expected = [text(server, prompt, max_tokens=8) for prompt in prompts]
    pools.wait_until_free(5)  # empties the caches, so that the prefill takes its time again
    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(text, server, prompt, max_tokens=8) for prompt in prompts]
        assert wait_for(lambda: pools.state("prefill")["running"] > 0, 10)
        os.kill(server.pids("prefill")[0], signal.SIGKILL)
        assert [answer.result(60) for answer in answers] == expected
    assert wait_for(lambda: len(pools.engines("prefill")) == 2, RECOVERY_S)


def test_health_is_the_truth(server: Server, pools: Pools) -> None:
    """503 when no decode worker is left, 200 once there is one again."""
    for pid in server.pids("decode"):
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: server.client.get("/health").status_code == 503, 10)
    assert wait_for(lambda: server.client.get("/health").status_code == 200, RECOVERY_S)
    assert wait_for(lambda: len(pools.engines("decode")) == 2, RECOVERY_S)
    assert text(server, PROMPT, max_tokens=4)


def test_streams_do_not_need_serves_controller(server: Server, pools: Pools) -> None:
    """It dies: a stream goes on, new requests are served, and once Ray has restarted it, it replaces workers again."""
    expected = text(server, PROMPT, max_tokens=600)
    controller = next(pid for pid, name in marked(server.mark).items() if name.startswith("ray::ServeController"))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(text, server, PROMPT, max_tokens=600)
        os.kill(controller, signal.SIGKILL)
        for i in range(20):
            assert text(server, [*PROMPT, 200 + i], max_tokens=4)
        assert running.result(60) == expected
    killed = server.pids("decode")[0]
    os.kill(killed, signal.SIGKILL)
    assert wait_for(lambda: len(server.pids("decode")) == 2 and killed not in server.pids("decode"), RECOVERY_S)
    assert wait_for(lambda: len(pools.engines("decode")) == 2, RECOVERY_S)
    assert text(server, PROMPT, max_tokens=4)
