"""Text through prefill and decode is the text of one engine, and its KV really moved."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import MODEL, Server
from tests.pools import Pools

LENGTHS = (1, 2, 3, 5, 17, 64, 100, 127, 128, 129, 200, 255, 256, 257, 300, 500, 700, 1000, 1500, 2047, 2100, 3000)
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2  # layers x (K, V) x KV heads x head size x bfloat16


NEAR_TIE = 0.1
"""Nats between two choices below which the order of a kernel's additions may decide which comes first."""


def prompt_of(tokens: int) -> list[int]:
    """A prompt of ordinary token ids, the same in every run."""
    return random.Random(tokens).choices(range(1000, 40000), k=tokens)


def assert_same_tokens(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two answers have the same tokens, or part at a near tie."""
    ours, theirs = (answer["choices"][0]["logprobs"] for answer in (one, other))
    assert len(ours["tokens"]) == len(theirs["tokens"])
    for mine, its, top in zip(ours["tokens"], theirs["tokens"], theirs["top_logprobs"], strict=True):
        if mine != its:
            second, first = sorted(top.values())[-2:]
            assert first - second < NEAR_TIE, f"{mine!r} instead of {its!r}"
            return


@pytest.mark.parametrize("tokens", LENGTHS)
def test_text_equals_that_of_one_engine(server: Server, pools: Pools, tokens: int) -> None:
    """Greedy text through both pools is what the decode engine alone writes, and the blocks came by NIXL."""
    prompt = prompt_of(tokens)
    prefill, decode = pools.state("prefill"), pools.state("decode")
    apart = server.complete(prompt, max_tokens=8, temperature=0, logprobs=2)
    read = pools.state("prefill") - prefill
    pulled = pools.state("decode") - decode
    assert read["prompt_tokens_computed"] == tokens
    assert pulled["prompt_tokens_computed"] == 1, "decode computes the last prompt token only"
    assert pulled["prompt_tokens_pulled"] == tokens - 1
    assert pulled["pulls"] >= (1 if tokens > 1 else 0)
    assert pulled["pulled_bytes"] >= (tokens - 1) * KV_BYTES_PER_TOKEN

    assert not pools.held()  # and so the caches are empty: the decode engine reads the whole prompt itself
    # A request for prompt logprobs runs whole.
    together = server.complete(prompt, max_tokens=8, temperature=0, logprobs=2, prompt_logprobs=0)
    assert_same_tokens(apart, together)
    assert apart["usage"]["prompt_tokens"] == tokens


def test_cached_tokens_are_those_that_nobody_computed(server: Server, pools: Pools) -> None:
    """The second time, the prompt's full blocks but the last are in the prefill engine's cache, and usage says so."""
    prompt = prompt_of(700)
    first = server.complete(prompt, max_tokens=2)
    before = pools.state("prefill")
    second = server.complete(prompt, max_tokens=2)
    computed = (pools.state("prefill") - before)["prompt_tokens_computed"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 700 - computed == 640


def test_sixteen_streams_at_once(server: Server) -> None:
    """Concurrent greedy streams each give the text that they give alone."""
    prompts = [prompt_of(20 + 30 * i) for i in range(16)]
    alone = [server.complete(prompt, max_tokens=12, temperature=0)["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: stream_text(server, prompt), prompts))
    # Batching changes the order of additions in a kernel, so a near tie may fall the other way now and then.
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 14


def stream_text(server: Server, prompt: list[int]) -> str:
    """The text of a streamed greedy completion, which must end properly."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}
    text, finished = "", None
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
                finished = choice["finish_reason"] or finished
    assert finished in ("length", "stop")
    return text
