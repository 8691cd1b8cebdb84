"""A real decode engine dies in the middle of a stream."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import MODEL, Server, wait_for
from tests.pools import Pools

REPLACED_S = 400.0
COUNTING = {
    "model": MODEL,
    "prompt": " ".join(str(number) for number in range(1, 40)),
    "max_tokens": 60,
    "ignore_eos": True,
    "temperature": 0,
    "logprobs": 2,
}
"""A continuation without near ties: kernels that add in another order after the move must not change a token."""

LEAST_MARGIN = 1.0
"""Nats between the first and the second choice of every token; rounding moves them by hundredths."""


@pytest.fixture(autouse=True)
def whole_again(server: Server, nothing_held: None) -> Iterator[None]:
    """The tests after this one need both engines, whatever happens here."""
    yield
    assert wait_for(lambda: server.client.get("/health").status_code == 200, REPLACED_S)


def test_a_stream_outlives_its_decode_engine(server: Server, pools: Pools) -> None:
    """It goes on in the other pool: the text, the logprobs and the usage are those of an undisturbed stream."""
    whole = server.complete(**COUNTING)
    tops = [sorted(top.values())[-2:] for top in whole["choices"][0]["logprobs"]["top_logprobs"]]
    assert min(first - second for second, first in tops) > LEAST_MARGIN
    died = pools.engines("decode")
    chunks: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    body = {**COUNTING, "stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            chunks += event["choices"]
            if len(chunks) == 10:
                os.kill(server.engine_cores("decode")[0], signal.SIGKILL)
    assert "".join(chunk["text"] for chunk in chunks) == whole["choices"][0]["text"]
    tokens = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (whole["usage"]["prompt_tokens"], 60)
    assert _resumed(server) == 1

    # Until it is replaced the prefill worker answers alone.
    assert server.complete(**COUNTING)["choices"][0]["text"] == whole["choices"][0]["text"]
    assert wait_for(lambda: len(pools.engines("decode")) == 1 and pools.engines("decode") != died, REPLACED_S)
    assert wait_for(lambda: server.client.get("/health").status_code == 200, REPLACED_S)
    assert server.complete(**COUNTING)["choices"][0]["text"] == whole["choices"][0]["text"]


def test_a_grammar_outlives_its_decode_engine(server: Server, pools: Pools) -> None:
    """Structured output that goes on elsewhere is one document: a grammar begun anew would have made two halves."""
    pattern = r"[0-9]{3}(-[0-9]{3}){19}"
    body = {"model": MODEL, "prompt": "Numbers: ", "max_tokens": 200, "temperature": 0, "stream": True}
    body["structured_outputs"] = {"regex": pattern}
    resumed = _resumed(server)
    text, reasons, events = "", [], 0
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            text, events = text + choice["text"], events + 1
            reasons.append(choice["finish_reason"])
            if events == 10:
                os.kill(server.engine_cores("decode")[0], signal.SIGKILL)
    assert re.fullmatch(pattern, text), text
    assert [reason for reason in reasons if reason] == ["stop"]
    assert _resumed(server) == resumed + 1


def _resumed(server: Server) -> float:
    return server.metric("baton_recoveries_total", fault="WorkerLost", kind="resumed")
