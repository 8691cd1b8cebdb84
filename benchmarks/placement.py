"""Policies against each other, live: recorded traffic through `baton serve` on real Ray, 4 + 4 simulated engines.

    python -m benchmarks.placement run POLICY --azure FILE --mooncake FILE --out DIR     # once for each policy
    python -m benchmarks.placement report --out DIR --docs docs                          # table and plot

POLICY is a preset of `routing`. Traffic is a part of each trace with its own lengths and gaps, sped up or slowed down
to three levels of load, one after the other: the parts of what the prefill pool could read if nothing were cached.
Mooncake's blocks of 512 tokens are shrunk to 64, and its lengths with them; blocks that are equal there are equal here.
Its reuse is of what came minutes before, so the 600 requests before the part are sent first, unmeasured: they leave the
caches as the policy leaves them. Prompts are cut at 6,000 tokens and answers at 100.

A request is good when its first token comes within `--ttft` seconds and no gap between tokens is over `--gap`.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import yaml

from benchmarks.servers import ROOT, running
from benchmarks.streams import Stream, follow, percentile
from runtime.config import Config
from runtime.config_file import load

POLICIES = ("latency", "throughput", "always-disaggregated", "never", "least-loaded", "round-robin")
LEVELS = (0.3, 0.6, 0.9)
WORKERS = 4
READS_PER_S, STEP_S = 4000.0, 0.04
"""Prompt tokens that an engine reads per second, and its step: slow, so that the machine that runs all of them is no
bottleneck."""

SHRINK, MOONCAKE_BLOCK = 8, 512
MOONCAKE_FIRST, HISTORY = 3000, 600
"""Where Mooncake's part begins, and how many requests before it fill the caches: there most of each prompt is known."""

LONGEST_ANSWER, LONGEST_PROMPT = 100, 6000
PORT = 8610


@dataclass(frozen=True)
class Asked:
    """One request of a trace."""

    at_s: float
    prompt: list[int]
    answer: int


@dataclass
class Seen:
    """What a client saw of one request, in seconds; without a first token it failed."""

    first_s: float | None = None
    gap_s: float = 0.0
    itl_s: float = 0.0
    tokens: int = 0


def azure(path: Path) -> Iterator[Asked]:
    """Azure's conversations: lengths and times; every prompt is new."""
    rng, began = random.Random(0), None
    with path.open() as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            began = began or at
            tokens = min(int(row["ContextTokens"]), LONGEST_PROMPT)
            prompt = rng.choices(range(1000, 40000), k=tokens)
            yield Asked((at - began).total_seconds(), prompt, min(int(row["GeneratedTokens"]), LONGEST_ANSWER))


def mooncake(path: Path) -> Iterator[Asked]:
    """Mooncake's requests: equal blocks are equal tokens."""
    with path.open() as file:
        for line in file:
            record = json.loads(line)
            tokens = min(record["input_length"] // SHRINK, LONGEST_PROMPT)
            blocks = (random.Random(f"block {name}") for name in record["hash_ids"])
            made = (block.choices(range(1000, 40000), k=MOONCAKE_BLOCK // SHRINK) for block in blocks)
            prompt = list(itertools.islice(itertools.chain.from_iterable(made), max(1, tokens)))
            yield Asked(record["timestamp"] / 1000, prompt, min(record["output_length"], LONGEST_ANSWER))


def segment(requests: Iterator[Asked], level: float, seconds: float) -> list[Asked]:
    """As many of the next requests as keep the prefill pool at this level for so long, and their times to fit."""
    wanted, taken, tokens = level * WORKERS * READS_PER_S * seconds, [], 0
    while tokens < wanted:
        taken.append(next(requests))
        tokens += len(taken[-1].prompt)
    span = max(taken[-1].at_s - taken[0].at_s, 1e-3)
    return [Asked((r.at_s - taken[0].at_s) * seconds / span, r.prompt, r.answer) for r in taken]


async def ask(session: aiohttp.ClientSession, model: str, asked: Asked, salt: str, start: float) -> Seen:
    """Send a request at its time, and watch its tokens come."""
    await asyncio.sleep(max(0.0, start + asked.at_s - time.perf_counter()))
    stream = Stream()
    body = {"model": model, "prompt": asked.prompt, "max_tokens": max(1, asked.answer), "ignore_eos": True,
            "cache_salt": salt}  # fmt: skip
    await follow(session, body, stream)
    gaps = stream.gaps_s
    return Seen(stream.first_s, max(gaps, default=0.0), sum(gaps) / max(1, len(gaps)), len(stream.came_s))


async def case(url: str, model: str, asked: list[Asked], salt: str) -> list[Seen]:
    """One segment, as clients would send it."""
    async with client(url) as session:
        start = time.perf_counter() + 0.5
        return await asyncio.gather(*(ask(session, model, request, salt, start) for request in asked))


async def fill(url: str, model: str, asked: list[Asked], salt: str) -> None:
    """Have these prompts read in their order, as fast as it goes."""
    rest = iter(asked)

    async def work(session: aiohttp.ClientSession) -> None:
        for request in rest:
            await ask(session, model, Asked(0.0, request.prompt, 1), salt, 0.0)

    async with client(url) as session:
        await asyncio.gather(*(work(session) for _ in range(2 * WORKERS)))


def client(url: str) -> aiohttp.ClientSession:
    """As many connections as there are requests."""
    timeout = aiohttp.ClientTimeout(total=300)
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


def settings(policy: str) -> dict[str, Any]:
    """Baton's settings for a policy: the same engines for all."""
    return {
        **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
        "prefill": {"replicas": WORKERS},
        "decode": {"replicas": WORKERS},
        "routing": {"preset": policy, **({"gap_limit_s": 0.2} if policy == "latency" else {})},
        "simulator": {
            "prefill_tokens_per_s": READS_PER_S,
            "step_base_s": STEP_S,
            "step_per_request_s": 0.001,
            "num_blocks": 16_000,
        },
    }


def run(policy: str, traces: dict[str, Path], seconds: float, out: Path, levels: list[float]) -> None:
    """All cases of one policy; writes their figures."""
    readers = {"azure": azure, "mooncake": mooncake}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(settings(policy)))
        config: Config = load(path)
        command = [sys.executable, "-m", "runtime.cli", "serve", "--config", str(path), "--port", str(PORT)]
        figures = []
        with running(command, "ready: curl", PORT) as url:
            for name, trace in traces.items():
                requests = readers[name](trace)
                if name == "mooncake":
                    history = list(itertools.islice(requests, MOONCAKE_FIRST - HISTORY, MOONCAKE_FIRST))
                    asyncio.run(fill(url, config.model_name, history, name))
                for level in levels:
                    asked = segment(requests, level, seconds)
                    seen = asyncio.run(case(url, config.model_name, asked, name))
                    figures.append({"policy": policy, "trace": name, "level": level, "seconds": seconds,
                                    "seen": [asdict(each) for each in seen]})  # fmt: skip
                    print(policy, name, level, len(seen), "requests", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{policy}.json").write_text(json.dumps(figures))


def summary(figures: dict[str, Any], ttft_s: float, gap_s: float) -> dict[str, Any]:
    """The row of one case."""
    seen = [Seen(**each) for each in figures["seen"]]
    firsts = [each.first_s for each in seen if each.first_s is not None]
    good = sum(each.first_s is not None and each.first_s <= ttft_s and each.gap_s <= gap_s for each in seen)
    return {
        "policy": figures["policy"], "trace": figures["trace"], "level": figures["level"], "requests": len(seen),
        "ttft_p50": percentile(firsts, 0.5), "ttft_p99": percentile(firsts, 0.99),
        "itl_p50": statistics.median(each.itl_s for each in seen),
        "gap_p99": percentile([each.gap_s for each in seen], 0.99), "good": good / figures["seconds"],
    }  # fmt: skip


def report(out: Path, docs: Path, ttft_s: float, gap_s: float) -> None:
    """A table in Markdown and a plot of all policies that were run."""
    files = [out / f"{policy}.json" for policy in POLICIES]
    cases = [case for file in files if file.exists() for case in json.loads(file.read_text())]
    rows = [summary(case, ttft_s, gap_s) for case in cases]
    columns = [
        "trace",
        "load",
        "policy",
        "requests",
        "first token p50, s",
        "p99, s",
        "ITL p50, ms",
        "gap p99, s",
        "good/s",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda r: (r["trace"], r["level"], POLICIES.index(r["policy"]))):
        lines.append(f"| {row['trace']} | {row['level']:.0%} | {row['policy']} | {row['requests']} "
                     f"| {row['ttft_p50']:.2f} | {row['ttft_p99']:.2f} | {row['itl_p50'] * 1e3:.0f} "
                     f"| {row['gap_p99']:.2f} | {row['good']:.2f} |")  # fmt: skip
    lines += ["", *aims(rows)]
    (docs / "placement-figures.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(rows, docs / "placement-figures.png")


def aims(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How `latency` stands to the policies that it is to be better than, in each case, as a Markdown table."""
    yield "| trace | load | goodput, over the better of always and never | first token p50, round robin over this |"
    yield "|---|---|---|---|"
    by_case = {(row["trace"], row["level"], row["policy"]): row for row in rows}
    for trace, level in sorted({case[:2] for case in by_case}):
        ours, always, never, turns = (
            by_case.get((trace, level, policy))
            for policy in ("latency", "always-disaggregated", "never", "round-robin")
        )
        if ours and always and never and turns:
            goodput = ours["good"] / max(always["good"], never["good"])
            yield f"| {trace} | {level:.0%} | {goodput:.2f} | {turns['ttft_p50'] / ours['ttft_p50']:.1f} |"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """First token and goodput over the level of load, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = sorted({row["trace"] for row in rows})
    figure, grid = pyplot.subplots(2, len(traces), figsize=(5 * len(traces), 7), squeeze=False)
    for column, trace in enumerate(traces):
        for axes, value, name in ((grid[0][column], "ttft_p50", "first token p50, s"),
                                  (grid[1][column], "good", "good requests per second")):  # fmt: skip
            for policy in POLICIES:
                points = sorted((r["level"], r[value]) for r in rows if (r["trace"], r["policy"]) == (trace, policy))
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=policy)
            axes.set(title=trace, xlabel="load, as a part of what the prefill pool reads", ylabel=name, ylim=(0, None))
    grid[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run a policy, or report on all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("policy", nargs="?", choices=POLICIES, default="latency")
    parser.add_argument("--azure", type=Path)
    parser.add_argument("--mooncake", type=Path)
    parser.add_argument("--seconds", type=float, default=45.0, help="of each segment")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--ttft", type=float, default=2.0, help="first token of a good request, in seconds")
    parser.add_argument("--gap", type=float, default=0.4, help="longest gap of a good request, in seconds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    if given.what == "report":
        report(given.out, given.docs, given.ttft, given.gap)
        return
    traces = {name: path for name in ("azure", "mooncake") if (path := getattr(given, name))}
    run(given.policy, traces, given.seconds, given.out, given.levels)


if __name__ == "__main__":
    main()
