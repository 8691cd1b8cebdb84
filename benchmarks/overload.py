"""Five times more than the workers can do, for a minute: what is answered in time, what is refused and how, and after.

    python -m benchmarks.overload

Simulated engines on real Ray. Requests come at random (Poisson), whether earlier ones are answered or not, and nobody
tries again. Goodput counts requests that were answered in full with a first token within `--limit` seconds. The same
load is sent twice: with Baton's bounds, and with bounds so wide that nothing is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import yaml

from benchmarks.servers import ROOT, running
from benchmarks.streams import percentile

MARK = "BATON_BENCHMARK"
SIMULATOR = {"prefill_tokens_per_s": 800, "step_base_s": 0.05, "max_batch_requests": 32, "max_step_tokens": 512}
RECOVERED_S = 5.0
"""So long after the load all is to be as before."""

PROMPT_TOKENS, ANSWER_TOKENS = 400, 10  # a prompt is 0.5 s of a worker: the machine has little to do
WIDE: dict[str, Any] = {"max_wait_s": 1e6, "max_waiting_requests": 10**9, "max_waiting_tokens": 10**9}


@dataclass(frozen=True)
class Outcome:
    """One request."""

    sent: float  # seconds from the start of its phase
    status: int
    first_token_s: float = float("inf")
    whole: bool = False
    typed: bool = False


class Client:
    """Sends requests that no cache knows."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, seed: int) -> None:
        self._session, self._url, self._model = session, url, model
        self._random = random.Random(seed)

    async def ask(self, sent: float) -> Outcome:
        """Stream one answer."""
        prompt = [self._random.randrange(1000, 20_000) for _ in range(PROMPT_TOKENS)]
        body = {"model": self._model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "stream": True}
        started, first = time.perf_counter(), float("inf")
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    return Outcome(sent, response.status, typed=is_typed(response, await response.read()))
                end = b""
                async for line in response.content:
                    if line.startswith(b"data: {"):  # and not a comment, which only keeps the connection alive
                        first = min(first, time.perf_counter() - started)
                    end = (end + line)[-400:]
        except aiohttp.ClientError:
            return Outcome(sent, 0)
        whole = b"[DONE]" in end and b'"finish_reason":"length"' in end
        return Outcome(sent, 200, first, whole)

    async def load(self, rate: float, seconds: float) -> list[asyncio.Task[Outcome]]:
        """So many requests a second for so long; those that are still running when the time is over run on."""
        started, at, tasks = time.perf_counter(), 0.0, []
        while (at := at + self._random.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(at)))
        await asyncio.sleep(max(0.0, started + seconds - time.perf_counter()))
        return tasks


def is_typed(response: aiohttp.ClientResponse, body: bytes) -> bool:
    """Whether a refusal says why in status, header and body, and when to come back."""
    reason = response.headers.get("x-baton-refusal")
    known = {"overloaded": 429, "starting": 503, "no_workers": 503}
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return False
    return known.get(reason or "") == response.status and code == reason and "retry-after" in response.headers


def front_of_house_mb(mark: str) -> float:
    """Resident memory of Serve's proxies and of the front ends, in MB."""
    total = 0
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            name = (proc / "cmdline").read_text()
            if (
                name.startswith(("ray::ServeReplica:baton:front-end", "ray::ProxyActor"))
                and mark.encode() in (proc / "environ").read_bytes()
            ):
                total += int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # it ended while we looked
    return total / 2**20


async def sample(mark: str, samples: list[float]) -> None:
    """Note the memory each second."""
    while True:
        samples.append(front_of_house_mb(mark))
        await asyncio.sleep(1)


def goodput(outcomes: list[Outcome], seconds: float, limit_s: float, skip_s: float = 0.0) -> float:
    """Requests sent after `skip_s`, answered in full and in time, per second."""
    good = [o for o in outcomes if o.whole and o.first_token_s <= limit_s and o.sent >= skip_s]
    return len(good) / (seconds - skip_s)


async def capacity(client: Client, seconds: float, streams: int) -> float:
    """Requests answered per second when there are always so many."""
    ended, stop = 0, time.perf_counter() + seconds

    async def one() -> None:
        nonlocal ended
        while time.perf_counter() < stop:
            outcome = await client.ask(0.0)
            ended += outcome.whole and time.perf_counter() < stop

    await asyncio.gather(*(one() for _ in range(streams)))
    return ended / seconds


async def measure(url: str, model: str, mark: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All phases against one server."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, url, model, seed=1)
        await capacity(client, 5, 4)  # warms up
        full = await capacity(client, asked.probe, 24)
        light = await asyncio.gather(*await client.load(0.3 * full, asked.after))
        normal = percentile([o.first_token_s for o in light], 0.95)
        peak = 0.0
        for part in (0.7, 0.9, 1.0):
            outcomes = await asyncio.gather(*await client.load(part * full, asked.probe))
            peak = max(peak, goodput(outcomes, asked.probe, asked.limit))
        memory: list[float] = []
        sampler = asyncio.create_task(sample(mark, memory))
        overload = await client.load(asked.times * full, asked.seconds)
        after = await client.load(0.3 * full, asked.after)
        sampler.cancel()
        for task in [*overload, *after]:
            if not task.done() and asked.wide:
                task.cancel()
        done = [t for t in await asyncio.gather(*overload, return_exceptions=True) if isinstance(t, Outcome)]
        later = [t for t in await asyncio.gather(*after, return_exceptions=True) if isinstance(t, Outcome)]
    settled = [o.first_token_s for o in later if o.sent >= RECOVERED_S]
    return {
        "capacity": full,
        "normal": normal,
        "peak": peak,
        "goodput": goodput(done, asked.seconds, asked.limit, skip_s=5.0),
        "statuses": Counter(o.status for o in done),
        "untyped": sum(o.status != 200 and not o.typed for o in done),
        "first": [o.first_token_s for o in done if o.whole],
        "memory": memory,
        "later": percentile(settled, 0.95) if len(later) == len(after) else float("inf"),
    }


def show(name: str, found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print one server's figures."""
    memory = found["memory"][: int(asked.seconds)]
    third = max(1, len(memory) // 3)
    first, last = statistics.median(memory[third : 2 * third]), statistics.median(memory[-third:])
    median, p99 = (percentile(found["first"] or [float("inf")], part) for part in (0.5, 0.99))
    statuses = ", ".join(f"{status or 'no answer'}: {count}" for status, count in sorted(found["statuses"].items()))
    print(f"{name}")
    print(f"  capacity                   {found['capacity']:.1f} requests/s")
    print(f"  best goodput up to that    {found['peak']:.1f} requests/s")
    print(f"  goodput at {asked.times:g} times        {found['goodput']:.1f} requests/s "
          f"({found['goodput'] / found['peak']:.0%} of the best)")  # fmt: skip
    print(f"  statuses                   {statuses}; refusals without a type: {found['untyped']}")
    print(f"  first token, of those answered: median {median:.2f} s, p99 {p99:.2f} s")
    print(f"  memory, second and last third: {first:.0f} MB, {last:.0f} MB ({last / first - 1:+.1%})")
    print(f"  first token (p95) before   {found['normal']:.2f} s; from {RECOVERED_S:g} s after the load's end on "
          f"{found['later']:.2f} s ({found['later'] / found['normal']:.2f} times)")  # fmt: skip


def main() -> None:
    """Run both servers, one after the other, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=5.0, help="the load, as a multiple of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--probe", type=float, default=15.0, help="seconds of each other phase")
    parser.add_argument("--after", type=float, default=20.0, help="seconds of light load before and afterwards")
    parser.add_argument("--limit", type=float, default=3.0, help="first token within so many seconds is in time")
    parser.add_argument("--workers", type=int, default=2, help="of each pool")
    parser.add_argument("--bounds", choices=["both", "kept", "wide"], default="both")
    asked = parser.parse_args()
    settings: dict[str, Any] = yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text())
    settings |= {"simulator": SIMULATOR, "prefill": {"replicas": asked.workers}, "decode": {"replicas": asked.workers}}
    # A prompt at a time, for workers without figures; those with figures get half a second of prompts.
    bounds = {"kept": {"max_wait_s": asked.limit / 2, "engine_queue_tokens": PROMPT_TOKENS}, "wide": WIDE}
    for name, admission in bounds.items():
        if asked.bounds not in ("both", name):
            continue
        asked.wide = name == "wide"
        with TemporaryDirectory() as folder:
            path = Path(folder) / "settings.yaml"
            path.write_text(yaml.safe_dump({**settings, "admission": admission}))
            os.environ[MARK] = mark = uuid.uuid4().hex
            line = [sys.executable, "-m", "runtime.cli", "serve", "--config", str(path), "--port", "8611"]
            with running(line, "ready: curl", 8611) as url:
                found = asyncio.run(measure(url, "SmolLM2-135M-Instruct", mark, asked))
        show(f"bounds {name}: {admission}", found, asked)


if __name__ == "__main__":
    main()
