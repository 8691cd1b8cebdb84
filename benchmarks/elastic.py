"""Pools that follow the load, on real Ray with simulated engines.

    python -m benchmarks.elastic --traffic step --out docs/elastic-step.png
    python -m benchmarks.elastic --traffic ratio --out docs/elastic-ratio.png

`step`: ten times as many requests and back. `ratio`: long prompts with short answers, then the reverse. Open loop:
requests come at their times whatever becomes of the ones before. Simulated engines are slow on purpose, so that a few
requests a second fill them and the machine does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from tests.conftest import MODEL, baton_serve

SETTINGS: dict[str, Any] = {
    "model": "demo",
    "engine": "simulated",
    "engine_args": {"max_model_len": 8192},
    "simulator": {"prefill_tokens_per_s": 1500, "step_base_s": 0.005, "step_per_request_s": 0.01},
    "scaling": {
        "prefill": {"min": 1, "max": 4},
        "decode": {"min": 1, "max": 4},
        "shrink_after_s": 15,
        "borrow_s": 2,
    },
}

PROMPT_TOKENS, ANSWER_TOKENS = 800, 60
POOLS = ("prefill", "decode")


@dataclass
class Run:
    """What was seen: one sample a second, and how each request ended."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    failed: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def most(self, pool: str) -> int:
        """Most ready workers that a pool had."""
        return max((sample[pool]["ready"] for sample in self.samples), default=0)

    def last(self, pool: str) -> int:
        """Workers that a pool was to have at the end."""
        return int(self.samples[-1][pool]["desired"])


def never(_: Run) -> bool:
    """A phase lasts as long as it was given."""
    return False


class Phase(NamedTuple):
    """So many requests a second for so long, or until something is seen."""

    seconds: float
    per_s: float
    until: Callable[[Run], bool] = never
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS


LONG_PROMPTS, LONG_ANSWERS = (3000, 4), (100, 300)
"""Tokens of a prompt and of its answer, for traffic that is work for one pool above all."""


def traffic(kind: str, low_per_s: float, seconds: tuple[float, float, float]) -> list[Phase]:
    """The phases of a run."""
    if kind == "step":
        rates = (low_per_s, 10 * low_per_s, low_per_s)
        return [Phase(*both) for both in zip(seconds, rates, strict=True)]
    first, second, last = seconds
    return [
        Phase(first, 1.5, never, *LONG_PROMPTS),
        Phase(second, 0.5, never, *LONG_ANSWERS),
        Phase(last, low_per_s),
    ]


async def run(url: str, phases: list[Phase], seed: int = 1) -> Run:
    """Offer the load of each phase; wait for all answers."""
    seen, dice, started = Run(), random.Random(seed), time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        now = [phases[0]]
        watch = asyncio.create_task(_watch(client, seen, started, now))
        requests = []
        for phase in phases:
            now[0] = phase
            end = time.monotonic() + phase.seconds
            while (wait_s := dice.expovariate(phase.per_s)) + time.monotonic() < end and not phase.until(seen):
                await asyncio.sleep(wait_s)
                requests.append(asyncio.create_task(_ask(client, seen, dice.randrange(1000, 20_000), phase)))
            await asyncio.sleep(0.0 if phase.until(seen) else max(0.0, end - time.monotonic()))
        await asyncio.gather(*requests)
        watch.cancel()
    return seen


async def _ask(client: httpx.AsyncClient, seen: Run, start: int, phase: Phase) -> None:
    body = {
        "model": MODEL,
        "prompt": list(range(start, start + phase.prompt_tokens)),
        "max_tokens": phase.answer_tokens,
        "stream": True,
    }
    asked, first, chunks, end = time.monotonic(), 0.0, 0, ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                seen.failed.append(f"{response.status_code}: {(await response.aread())[:200]!r}")
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.monotonic()
                    chunks += 1
                    end = json.loads(line[6:])["choices"][0]["finish_reason"] or end
    except httpx.HTTPError as error:
        seen.failed.append(repr(error))
        return
    if end != "length":
        seen.failed.append(f"ended with {end!r} after {chunks} chunks")
        return
    seen.done += 1
    seen.ttft_s.append(first - asked)


async def _watch(client: httpx.AsyncClient, seen: Run, started: float, now: list[Phase]) -> None:
    while True:
        pools = (await client.get("/baton/fleet")).json()["pools"]
        phase = now[0]
        sample: dict[str, Any] = {"at_s": time.monotonic() - started, "rate": phase.per_s}
        sample |= {"read_s": phase.per_s * phase.prompt_tokens, "written_s": phase.per_s * phase.answer_tokens}
        for pool in POOLS if pools else ():
            load, answer = pools[pool]["load"], pools[pool]["answer"]
            sample[pool] = {
                "ready": load["ready"],
                "starting": load["starting"],
                "draining": load["draining"],
                "desired": answer["workers"],
                "reason": answer["reason"],
                "backlog_s": load["backlog_s"],
            }
        if pools:
            seen.samples.append(sample)
        await asyncio.sleep(1.0)


def plot(seen: Run, path: Path) -> None:
    """Load, desired and ready workers over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = [sample["at_s"] for sample in seen.samples]
    figure, (above, *below) = plt.subplots(3, 1, sharex=True, figsize=(9, 6), constrained_layout=True)
    for name, label in (("read_s", "prompts"), ("written_s", "answers")):
        above.step(times, [sample[name] for sample in seen.samples], where="post", label=label)
    above.set_ylabel("offered tokens/s")
    above.set_yscale("log")
    above.legend(loc="upper right")
    for axis, pool in zip(below, POOLS, strict=True):
        axis.step(times, [s[pool]["desired"] for s in seen.samples], where="post", label="desired", linestyle="--")
        axis.step(times, [s[pool]["ready"] for s in seen.samples], where="post", label="ready")
        axis.set_ylabel(f"{pool} workers")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper right")
    below[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run it all and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traffic", choices=("step", "ratio"), default="step", help="how the load changes")
    parser.add_argument("--out", type=Path, default=Path("elastic.png"), help="the plot; its samples go beside it")
    parser.add_argument("--low", type=float, default=0.4, help="requests a second where there is little load")
    parser.add_argument("--seconds", type=float, nargs=3, default=(40, 110, 150), help="of the three phases")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text(yaml.safe_dump(SETTINGS))
        with baton_serve(settings) as server:
            phases = traffic(arguments.traffic, arguments.low, arguments.seconds)
            seen = asyncio.run(run(server.url, phases))
    plot(seen, arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(seen.samples))
    ttft = sorted(seen.ttft_s)
    print(f"{seen.done} done, {len(seen.failed)} failed {seen.failed[:3]}")
    print(f"time to first token: median {ttft[len(ttft) // 2]:.2f} s, p95 {ttft[int(len(ttft) * 0.95)]:.2f} s")
    for pool in POOLS:
        print(f"{pool}: at most {seen.most(pool)} workers, {seen.last(pool)} at the end")


if __name__ == "__main__":
    main()
