"""Overload over HTTP: refused in OpenAI's shape before the response starts, in order of priority, and in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx
import pytest

from tests.conftest import MODEL, Server, wait_for
from tests.pools import Pools

NUMBERS = count()
LONG = 7500  # tokens: 0.4 s of a simulated prefill worker


def post(server: Server, path: str = "/v1/completions", tokens: int = LONG, **more: Any) -> httpx.Response:
    """A prompt of so many tokens that nobody has sent before."""
    prompt = [2000 + next(NUMBERS), *range(3000, 2999 + tokens)]
    headers = {name.replace("_", "-"): str(more.pop(name)) for name in list(more) if name.startswith("x_")}
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 1, **more}
    if path == "/v1/chat/completions":
        body |= {"messages": [{"role": "user", "content": f"{prompt[0]} " * 1000}]}
    if path == "/v1/messages":
        body |= {"messages": [{"role": "user", "content": f"{prompt[0]} " * 1000}]}
    if path == "/v1/responses":
        body = {"model": MODEL, "input": f"{prompt[0]} " * 1000, "max_output_tokens": 1, **more}
    if not path.startswith("/v1/completions"):
        body.pop("prompt", None)
    return server.post(path, body, headers=headers)


def waiting(server: Server) -> float:
    """Requests that wait at the front end, by its own metric."""
    return server.metric("baton_waiting_requests")


@contextmanager
def queue(server: Server, requests: int, **more: Any) -> Iterator[list[Future[httpx.Response]]]:
    """So many long prompts, and more where a slow client let the first be served: a third of them wait.

    All are answered in the end.
    """
    with ThreadPoolExecutor(64) as threads:
        asked = [threads.submit(post, server, **more) for _ in range(requests)]

        def enough_wait() -> bool:
            if waiting(server) > requests / 3:
                return True
            served = sum(future.done() for future in asked)
            asked.extend(threads.submit(post, server, **more) for _ in range(requests + served - len(asked)))
            return False

        assert wait_for(enough_wait, 30)
        yield asked
    assert {future.result().status_code for future in asked} == {200}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_refused_before_the_response_starts(server: Server, path: str, stream: bool) -> None:
    """429 with its reason in body, header and metric, and with a time to come back; of streams, too."""
    before = refused(server, "overloaded")
    with queue(server, 24):
        response = post(server, path, stream=stream, x_baton_deadline_ms=1000, x_baton_priority="low")
    assert response.status_code == 429, response.text
    assert response.headers["x-baton-refusal"] == "overloaded"
    assert 1 <= int(response.headers["retry-after"]) <= 10
    assert refused(server, "overloaded") == before + 1
    answer = response.json()
    if path == "/v1/messages":
        assert (answer["type"], answer["error"]["type"]) == ("error", "rate_limit_error")
    else:
        assert answer["error"]["code"] == "overloaded"
        assert {"message", "type", "param"} <= set(answer["error"])


def refused(server: Server, reason: str) -> int:
    """How many were refused for this reason, by the metric."""
    return int(server.metric("baton_refusals_total", reason=reason))


def test_choices_are_refused_together(server: Server, pools: Pools) -> None:
    """`n` choices of each of three prompts: one refusal, and no engine sees any of them."""
    before = refused(server, "overloaded")
    with queue(server, 24):
        body = {"model": MODEL, "prompt": [[5, 6, 7], [6, 7, 8], [7, 8, 9]], "n": 4, "max_tokens": 4}
        response = server.post(
            "/v1/completions", body, headers={"x-baton-deadline-ms": "1000", "x-baton-priority": "low"}
        )
    assert response.status_code == 429
    assert refused(server, "overloaded") == before + 1


def test_retry_after_is_true(server: Server) -> None:
    """Who comes back when told is served, though the deadline is as short as before."""
    with queue(server, 24):
        refused = post(server, tokens=50, x_baton_deadline_ms=1000, priority=1)
        assert refused.status_code == 429
        time.sleep(int(refused.headers["retry-after"]))
        assert post(server, tokens=50, x_baton_deadline_ms=1000, priority=1).status_code == 200


def test_priority(server: Server) -> None:
    """Later requests of a better class are answered first: by header, or by vLLM's field."""
    done: list[str] = []

    def note(name: str, **more: Any) -> None:
        assert post(server, **more).status_code == 200
        done.append(name)

    with queue(server, 24), ThreadPoolExecutor(12) as threads:
        for _ in range(4):
            threads.submit(note, "low", x_baton_priority="low")
        time.sleep(0.3)
        for _ in range(2):
            threads.submit(note, "high", x_baton_priority="high")
            threads.submit(note, "high", priority=-1)
    assert done == ["high"] * 4 + ["low"] * 4


def test_a_deadline_drops_what_is_not_begun(server: Server, pools: Pools) -> None:
    """Others go first and the deadline passes: 504, and no engine reads the prompt."""
    before = pools.state("prefill")["prompt_tokens_computed"] + pools.state("decode")["prompt_tokens_computed"]
    with queue(server, 14) as first, ThreadPoolExecutor(64) as threads:
        late = threads.submit(post, server, tokens=5000, x_baton_priority="low", x_baton_deadline_ms=6000)
        more: list[Future[httpx.Response]] = []
        while not late.done():
            if sum(not future.done() for future in more) < 30:
                more.append(threads.submit(post, server, x_baton_priority="high"))
            time.sleep(0.05)  # four times as fast as they are served
    response = late.result()
    assert response.status_code == 504, response.text
    assert response.json()["error"]["code"] == response.headers["x-baton-refusal"] == "deadline"
    after = pools.state("prefill")["prompt_tokens_computed"] + pools.state("decode")["prompt_tokens_computed"]
    assert after - before <= (len(first) + len(more)) * (LONG + 1)


def test_a_client_that_leaves_the_queue(server: Server) -> None:
    """It waits no more, and nobody computes for it."""
    with queue(server, 24):
        before = waiting(server)
        with pytest.raises(httpx.ReadTimeout):
            server.client.post(
                "/v1/completions",
                json={"model": MODEL, "prompt": list(range(2000, 9000)), "max_tokens": 1, "priority": 1},
                timeout=0.3,
            )
        assert wait_for(lambda: waiting(server) <= before, 2)


def test_too_long(server: Server) -> None:
    """A prompt over the window: 400, with OpenAI's own code."""
    response = post(server, tokens=9000)
    assert response.status_code == 400
    assert response.headers["x-baton-refusal"] == "context_length_exceeded"
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "8192" in response.json()["error"]["message"]
