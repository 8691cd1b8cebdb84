"""Streams as a client sees them: they end once and properly, or are `Broken`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.conftest import MODEL, Server


class Broken(Exception):
    """A request that was refused, cut, or did not end as it should; `text` is what came before."""

    def __init__(self, why: str, text: str = "") -> None:
        super().__init__(why, text)
        self.text = text


def body(prompt: Any, tokens: int, **params: Any) -> dict[str, Any]:
    """A greedy streaming completion of exactly `tokens` tokens."""
    fixed = {"model": MODEL, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {**fixed, "prompt": prompt, **params}


def stream(
    client: httpx.Client, prompt: Any, tokens: int, on_event: Callable[[int], object] = lambda count: None
) -> str:
    """The text of a stream; `on_event` is called with the number of events so far.

    Raises:
        Broken: with what came until then.
    """
    text, reasons, done = "", [], False
    try:
        with client.stream("POST", "/v1/completions", json=body(prompt, tokens)) as response:
            if response.status_code != 200:
                raise Broken(f"{response.status_code} {response.read()!r}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if done or "choices" not in event:
                        raise Broken(line, text)
                    text += event["choices"][0]["text"]
                    reasons.append(event["choices"][0]["finish_reason"])
                    on_event(len(reasons))
                done = done or line == "data: [DONE]"
    except httpx.HTTPError as error:
        raise Broken(repr(error), text) from error
    if not done or [reason for reason in reasons if reason] != ["length"]:
        raise Broken(f"{len(reasons)} events, done: {done}, reasons {reasons[-3:]}", text)
    return text


def whole(client: httpx.Client, prompt: Any, tokens: int) -> str:
    """The text of the same request without streaming. Raises as `stream`."""
    try:
        response = client.post("/v1/completions", json=body(prompt, tokens, stream=False))
    except httpx.HTTPError as error:
        raise Broken(repr(error)) from error
    if response.status_code != 200:
        raise Broken(f"{response.status_code} {response.text}")
    return str(response.json()["choices"][0]["text"])


def leave(client: httpx.Client, prompt: Any, tokens: int, after_events: int) -> None:
    """Disconnect from a stream after some events; 0 is after the response's head. Raises as `stream`."""
    try:
        with client.stream("POST", "/v1/completions", json=body(prompt, tokens)) as response:
            if response.status_code != 200:
                raise Broken(f"{response.status_code} {response.read()!r}")
            for _ in zip(range(2 * after_events), response.iter_lines(), strict=False):  # an event is two lines
                pass
    except httpx.HTTPError as error:
        raise Broken(repr(error)) from error


MARGIN = 0.5
"""Logprob by which the first choice must lead the second at every token: rounding in bfloat16 moves about 0.1."""

CANDIDATES = [
    ", ".join(str(number) for number in range(1, 60)) + ",",
    ", ".join(str(number) for number in range(100, 320)) + ",",
    " ".join(f"{number}" for number in range(1, 50)),
    " ".join(f"{number}" for number in range(200, 330)),
    "The cat sat on the mat. " * 40,
]
"""Texts that go on by themselves; some are longer than a block (128 tokens), some shorter."""


def certain(server: Server, tokens: int) -> dict[str, str]:
    """Prompts whose greedy continuation by a real engine is beyond doubt, and that continuation."""
    found = {}
    for prompt in CANDIDATES:
        params: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 2}
        choice = server.complete(prompt, **params)["choices"][0]
        margins = [max(top.values()) - min(top.values()) for top in choice["logprobs"]["top_logprobs"]]
        print(f"margin {min(margins):5.2f}: {prompt[:30]!r}")
        if min(margins) >= MARGIN:
            found[prompt] = choice["text"]
    assert len(found) >= 3, "too few prompts whose continuation is certain"
    return found
