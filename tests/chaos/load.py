"""Clients that never rest, and what became of each of their requests."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tests.chaos.streams import Broken, leave, stream, whole

ROUTED_S = 3.0
"""For so long after its death a front end may still be given requests: Ray Serve's proxy has to hear of it."""


@dataclass(frozen=True)
class Outcome:
    """One request's end, in seconds of the monotonic clock; `problem` is None when all was well."""

    kind: str
    started: float
    ended: float
    problem: str | None

    def excused_by(self, front_end_deaths: Sequence[float]) -> bool:
        """Whether it may have been on a front end that died."""
        return any(self.started <= death + ROUTED_S and death <= self.ended for death in front_end_deaths)


class Load:
    """Closed-loop clients over HTTP: streams, whole answers, and some that leave.

    Args:
        pause_s: how long a client rests between requests.
        calibrate_on: how many different requests there are.
    """

    def __init__(self, url: str, seed: int, clients: int, pause_s: float = 0.0, calibrate_on: int = 24) -> None:
        chance = random.Random(seed)
        self.outcomes: list[Outcome] = []
        self._prompts = [
            chance.choices(range(2000, 20000), k=int(2 ** chance.uniform(2, 10.5))) for _ in range(calibrate_on)
        ]
        self._lengths = [chance.randint(5, 100) for _ in self._prompts]
        self._seed, self._clients, self._pause_s = seed, clients, pause_s
        self._http = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))
        self._threads = ThreadPoolExecutor(clients)
        self._calm = threading.Event()
        self._expected = list(self._threads.map(lambda p, n: stream(self._http, p, n), self._prompts, self._lengths))

    def start(self) -> None:
        """Let the clients loose."""
        self._work = [self._threads.submit(self._client, number) for number in range(self._clients)]

    def stop(self) -> None:
        """Let the requests end that are under way; all have when this returns."""
        self._calm.set()
        for work in self._work:
            work.result(320)
        self._threads.shutdown()
        self._http.close()

    def unexcused(self, front_end_deaths: Sequence[float]) -> list[Outcome]:
        """Failures that no front end's death explains; a wrong text is never explained."""
        return [
            outcome
            for outcome in self.outcomes
            if outcome.problem and (outcome.problem.startswith("wrong") or not outcome.excused_by(front_end_deaths))
        ]

    def counts(self) -> Counter[str]:
        """How many requests there were of each kind, and how many failed."""
        failed = sum(outcome.problem is not None for outcome in self.outcomes)
        return Counter(outcome.kind for outcome in self.outcomes) + Counter(failed=failed)

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        while not self._calm.wait(self._pause_s * chance.uniform(0.5, 1.5)):
            which = chance.randrange(len(self._prompts))
            kind = chance.choices(("stream", "whole", "leave"), (70, 15, 15))[0]
            started = time.monotonic()
            problem = self._try(kind, which, chance)
            self.outcomes.append(Outcome(kind, started, time.monotonic(), problem))

    def _try(self, kind: str, which: int, chance: random.Random) -> str | None:
        prompt, tokens, expected = self._prompts[which], self._lengths[which], self._expected[which]
        try:
            if kind == "leave":
                leave(self._http, prompt, tokens, chance.randint(0, tokens))
                return None
            text = (stream if kind == "stream" else whole)(self._http, prompt, tokens)
        except Broken as broken:
            return str(broken.args[0]) if expected.startswith(broken.text) else f"wrong text: {broken.text!r}"
        return None if text == expected else f"wrong text: {text!r} for {expected!r}"
