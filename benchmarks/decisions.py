"""How fast a request is placed: 1,000 workers, half of them prefill, and 1,000,000 blocks in the prefix index.

    python -m benchmarks.decisions

Each round does what a front end does for a request: name the blocks of its prompt, look them up, decide, note the
prediction in the index and the new loads in the snapshot. Most prompts go on with a conversation that one or two
workers hold, after a system prompt that all of them hold. Prints the median and the 99th percentile of each part, and
the memory of the index (resident size before and after it was filled).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from kv_transfer.block_keys import StoredBlocks, prompt_keys
from kv_transfer.index import PrefixIndex
from runtime.policy.routing import route
from runtime.policy.types import Cost, Disaggregated, RequestView, Snapshot, WorkerView

BLOCK = 16
SYSTEM_TOKENS = 16 * BLOCK
VOCABULARY = range(150_000)
PARTS = ("name the blocks", "look them up", "decide", "note it in index and snapshot")
AIMS = "look up and decide: median < 100 us, p99 < 500 us; index < 300 bytes a block"


def fill(index: PrefixIndex, workers: list[str], blocks: int, rng: random.Random) -> list[list[int]]:
    """Give the workers so many blocks, all in all. Returns some of the conversations that they hold."""
    system = rng.choices(VOCABULARY, k=SYSTEM_TOKENS)
    first = stored(system, None, rng)
    for worker in workers:
        index.add(worker, first)
    conversations: list[list[int]] = []
    while len(index) < blocks:
        tokens = rng.choices(VOCABULARY, k=rng.randrange(8, 120) * BLOCK)
        more = stored(tokens, first.hashes[-1], rng)
        for worker in rng.sample(workers, rng.choice((1, 2))):
            index.add(worker, more)
        if len(conversations) < 5000:
            conversations.append(system + tokens)
    return conversations


def stored(tokens: list[int], parent: bytes | int | None, rng: random.Random) -> StoredBlocks:
    """An engine's news of full blocks."""
    return StoredBlocks([rng.randbytes(32) for _ in range(len(tokens) // BLOCK)], parent, tokens, BLOCK)


def prefill(name: str, rng: random.Random) -> WorkerView:
    """A prefill worker with up to half a second of work."""
    queued = rng.randrange(10_000)
    return WorkerView(
        name,
        requests=1,
        tokens=1000,
        queued_tokens=queued,
        queued_requests=1 + queued // 2000,
        free_blocks=20_000,
        max_step_tokens=8192,
        prefill=Cost(0.01, 1 / 20_000),
        step=Cost(0.01, 1e-4),
    )


def decode(name: str, rng: random.Random) -> WorkerView:
    """A decode worker with some streams."""
    return WorkerView(
        name,
        requests=1,
        tokens=1000,
        queued_tokens=rng.choice((0, 0, 0, 200)),
        streams=rng.randrange(1, 128),
        free_blocks=rng.randrange(1000, 20_000),
        max_streams=256,
        max_step_tokens=2048,
        prefill=Cost(0.01, 1 / 20_000),
        step=Cost(0.01, 1e-4),
        pull=Cost(0.005, 1e-6),
    )


def prompt(conversations: list[list[int]], rng: random.Random) -> list[int]:
    """The next turn of a conversation (three of four), or of a new one: 1,300 tokens on average."""
    known = rng.choice(conversations)
    return known[: len(known) if rng.random() < 0.75 else SYSTEM_TOKENS] + rng.choices(VOCABULARY, k=200)


def run(index: PrefixIndex, snapshot: Snapshot, prompts: list[list[int]], rng: random.Random) -> list[list[float]]:
    """Seconds of each part, for each prompt."""
    spent: list[list[float]] = []
    for number, tokens in enumerate(prompts):
        now = number / 100.0  # 100 requests a second
        times = [time.perf_counter()]
        keys = prompt_keys(tokens, BLOCK)
        times.append(time.perf_counter())
        cached = index.match(keys, now)
        times.append(time.perf_counter())
        plan = route(RequestView(len(tokens), True, f"request-{number}", cached), snapshot)
        times.append(time.perf_counter())
        assert isinstance(plan, Disaggregated) or hasattr(plan, "decode")
        views = [decode(plan.decode, rng)] if plan.decode.startswith("d") else [prefill(plan.decode, rng)]
        views += [prefill(plan.prefill, rng)] if isinstance(plan, Disaggregated) else []
        begun = time.perf_counter()
        for view in views:
            index.predict(view.engine_id, keys, now)
            snapshot = snapshot.with_view(replace(view, requests=2))
        times.append(times[-1] + time.perf_counter() - begun)
        spent.append([after - before for before, after in pairwise(times)])
    return spent


def resident_bytes() -> int:
    """This process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def line(name: str, seconds: list[float]) -> str:
    """A row of the table, in microseconds."""
    return f"{name:32} {statistics.median(seconds) * 1e6:10.0f} {statistics.quantiles(seconds, n=100)[98] * 1e6:10.0f}"


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    names = [f"{role}{number}" for number in range(given.workers // 2) for role in ("p", "d")]
    index = PrefixIndex(BLOCK, max_entries=2 * given.blocks)
    gc.collect()
    before = resident_bytes()
    conversations = fill(index, names, given.blocks, rng)
    gc.collect()
    kept = sum(len(tokens) for tokens in conversations) * 36  # the prompts that we keep ourselves: an int, a place
    size = resident_bytes() - before - kept
    snapshot = Snapshot(
        tuple(prefill(name, rng) for name in names if name.startswith("p")),
        tuple(decode(name, rng) for name in names if name.startswith("d")),
    )
    gc.freeze()  # as a server does once it is up: the index is no garbage, so don't walk it
    prompts = [prompt(conversations, rng) for _ in range(given.requests)]
    parts = list(zip(*run(index, snapshot, prompts, rng), strict=True))
    tokens = statistics.mean(len(prompt) for prompt in prompts)
    print(f"python -m benchmarks.decisions --workers {given.workers} --blocks {given.blocks} --seed {given.seed}")
    print(f"{len(index):,} blocks on {len(names):,} workers, prompts of {tokens:.0f} tokens\n")
    print(f"{'microseconds':32} {'median':>10} {'p99':>10}")
    for name, seconds in zip(PARTS, parts, strict=True):
        print(line(name, list(seconds)))
    print(line("look up and decide", [a + b for a, b in zip(parts[1], parts[2], strict=True)]))
    print(line("all", [sum(each) for each in zip(*parts, strict=True)]))
    print(f"\n{size / len(index):.0f} bytes a block\naims: {AIMS}")


if __name__ == "__main__":
    main()
