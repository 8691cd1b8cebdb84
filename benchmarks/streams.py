"""Streamed completions as their client sees them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp


@dataclass
class Stream:
    """One streamed answer. Times are the client's, of `time.perf_counter`.

    Attributes:
        came_s: when each event with a token came.
        tokens: of the answer, where the server was asked to tell them (`stream_options`).
        whole: whether it ended, and as long as it was to be.
        trouble: what the server or the connection said instead.
    """

    sent_s: float = 0.0
    came_s: list[float] = field(default_factory=list)
    tokens: int = 0
    whole: bool = False
    trouble: str = ""

    @property
    def first_s(self) -> float | None:
        """Seconds until the first token, if one came."""
        return self.came_s[0] - self.sent_s if self.came_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events."""
        return [after - before for before, after in pairwise(self.came_s)]


async def follow(session: aiohttp.ClientSession, body: dict[str, Any], stream: Stream) -> None:
    """Send a completion and note what comes in `stream`, which so is of use before the end, too."""
    stream.sent_s = time.perf_counter()
    try:
        async with session.post("/v1/completions", json={**body, "stream": True}) as response:
            if response.status != 200:
                stream.trouble = f"{response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                _note(line, time.perf_counter(), stream)
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.trouble = repr(error)
    if not stream.whole:
        stream.trouble = stream.trouble or "it ended early"


def _note(line: bytes, now: float, stream: Stream) -> None:
    if not line.startswith(b"data: {"):
        return
    event = json.loads(line[len(b"data: ") :])
    if error := event.get("error"):
        stream.trouble = str(error)[:300]
    elif event["choices"]:  # the last event may have none, and only count
        stream.came_s.append(now)
        stream.whole = event["choices"][0].get("finish_reason") == "length"
        if usage := event.get("usage"):
            stream.tokens = usage["completion_tokens"]


def percentile(values: list[float], part: float) -> float:
    """Of the sorted values the one at this part."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else float("nan")
