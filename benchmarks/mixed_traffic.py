"""Streams that write all the time, and long and short prompts that come beside them: sent to a server, and recorded."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.streams import Stream, follow

BEGIN_S, ANSWER_S = 120.0, 1800.0
"""Longest wait for the first tokens of the streams, and for an answer."""


@dataclass(frozen=True)
class Request:
    """One request of the traffic."""

    at_s: float
    kind: str  # long or short
    prompt: list[int]
    answer: int


def new_prompt(tokens: int, *name: object) -> list[int]:
    """A prompt that no other one begins like; the same for the same name."""
    return random.Random(" ".join(map(str, name))).choices(range(1000, 40000), k=tokens)


def traffic(given: argparse.Namespace, number: int) -> list[Request]:
    """The long and short prompts of a round, in order of time; each kind starts half an interval after the start."""
    requests = []
    for kind in ("long", "short"):
        tokens, every, answer = (getattr(given, f"{kind}_{name}") for name in ("tokens", "every", "answer"))
        for i in range(round(given.seconds / every)):
            prompt = new_prompt(tokens, given.seed, number, kind, i)
            requests.append(Request((i + 0.5) * every, kind, prompt, answer))
    return sorted(requests, key=lambda request: request.at_s)


class Client:
    """Sends completions to one server."""

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session = session
        self._model = model

    async def ask(self, prompt: list[int], answer: int, stream: Stream | None = None) -> Stream:
        """Stream one answer of so many tokens."""
        stream = stream or Stream()
        body = {"model": self._model, "prompt": prompt, "max_tokens": answer, "ignore_eos": True, "temperature": 0,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
        await follow(self._session, body, stream)
        return stream

    async def ask_at(self, at: float, request: Request) -> Stream:
        """Wait for the request's time (of `time.perf_counter`), then send it."""
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        return await self.ask(request.prompt, request.answer)

    async def write(self, answers: Iterator[tuple[list[int], int]], streams: list[Stream]) -> None:
        """One answer after the other, each to a prompt and of so many tokens, until cancelled."""
        for prompt, tokens in answers:
            streams.append(Stream())
            await self.ask(prompt, tokens, streams[-1])
            if streams[-1].trouble:
                await asyncio.sleep(1)  # a server that refuses all is not to be flooded

    async def plans(self) -> Counter[str]:
        """How many requests Baton gave each plan, and why; vLLM's own server tells none."""
        async with self._session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        samples = (sample for family in families for sample in family.samples if sample.name == "baton_plans_total")
        return Counter({f"{s.labels['plan']}: {s.labels['reason']}": int(s.value) for s in samples})


async def warm(client: Client, given: argparse.Namespace) -> float:
    """Use what is slow the first time. Returns the first-token time of a long prompt alone."""
    first = await client.ask(new_prompt(given.short_tokens, "warm", "first"), given.short_answer)
    long = await client.ask(new_prompt(given.long_tokens, "warm", "long"), given.long_answer)
    both = (new_prompt(given.short_tokens, "warm", i) for i in range(2))
    rest = await asyncio.gather(*(client.ask(prompt, given.short_answer) for prompt in both))
    if trouble := [stream.trouble for stream in (first, long, *rest) if stream.trouble]:
        raise SystemExit(f"the server does not answer: {trouble}")
    assert long.first_s is not None  # else there was trouble
    return long.first_s


def long_answers(given: argparse.Namespace, number: int, k: int) -> Iterator[tuple[list[int], int]]:
    """What the round's stream `k` writes: prompts and tokens. The first answers are of different lengths, so that the
    streams end in turns.
    """
    for i in itertools.count():
        tokens = given.stream_answer if i else given.stream_answer * (k + 1) // given.streams
        yield new_prompt(given.short_tokens, given.seed, number, "stream", k, i), tokens


async def measure(url: str, model: str, given: argparse.Namespace, number: int) -> dict[str, Any]:
    """The traffic of a round against one server, as a record for `summary`; its times are from the traffic's start."""
    # A new connection each: a server that closes an idle one while it is used again would look like a failure.
    connector, timeout = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=ANSWER_S)
    requests = traffic(given, number)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        client = Client(session, model)
        alone_s = await warm(client, given)
        plans = await client.plans()
        streams: list[list[Stream]] = [[] for _ in range(given.streams)]
        writers = [
            asyncio.create_task(client.write(long_answers(given, number, k), streams[k])) for k in range(given.streams)
        ]
        async with asyncio.timeout(BEGIN_S):
            while not all(each and each[0].came_s for each in streams):
                await asyncio.sleep(0.01)
        start = time.perf_counter()
        answered = await asyncio.gather(*(client.ask_at(start + request.at_s, request) for request in requests))
        end = time.perf_counter()
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        plans = await client.plans() - plans
    return {
        "traffic_s": given.seconds,
        "end_s": end - start,
        "long_alone_s": alone_s,
        "plans": plans,
        "streams": [[seen(stream, start) for stream in each] for each in streams],
        "asked": [{"kind": request.kind, "at_s": request.at_s, "prompt_tokens": len(request.prompt),
                   **seen(stream, start)} for request, stream in zip(requests, answered, strict=True)],
    }  # fmt: skip


def seen(stream: Stream, start: float) -> dict[str, Any]:
    """A stream with its times from `start`."""
    came = [round(at - start, 5) for at in stream.came_s]
    return {**asdict(stream), "sent_s": round(stream.sent_s - start, 5), "came_s": came}


def as_stream(record: dict[str, Any]) -> Stream:
    """What `seen` wrote."""
    return Stream(*(record[name] for name in ("sent_s", "came_s", "tokens", "whole", "trouble")))
