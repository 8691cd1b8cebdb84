"""Long prompts beside running streams and short prompts, on real engines: Baton, and aggregated vLLM on the same cores.

    python -m benchmarks.beside_vllm --out FILE                          # two rounds of three servers, half an hour
    python -m benchmarks.beside_vllm --long-tokens 600 --long-every 12   # less than the machine can do
    python -m benchmarks.beside_vllm --report FILE                       # the table of a run again

Three servers have all cores of the machine, one after the other; each round starts each of them once, every other
round in reverse order, so that what else the machine does falls on all of them:

- `vllm`: vLLM's own server with one engine, whose threads are as many as there are cores. Its engine arguments and
  environment are those of Baton's prefill engines (whose steps are as large as vLLM's default); scheduling is vLLM's
  default (chunked prefill, prefix caching).
- `baton`: `baton serve` with `--config`, as it is.
- `always`: the same with `routing.preset: always-disaggregated`.

All get the same requests, at the same times and whether earlier ones are answered or not. Two streams write all the
time: when an answer ends, the next begins. Beside them come long prompts and short ones, each of new tokens. Streams
write on until the last of these is answered, and gaps count as long.

*Longest gap* and *p99 gap* are between two tokens of one answer of the streams, not from one answer to the next; the
silence in which a stream was broken off at the end counts for the longest. *First token* is from sending a request.
*Unread* are the long prompts without a first token when the traffic ends, half an interval after the last of them:
more than one, and prompts come faster than the server reads them. Then they queue, first tokens of long prompts (and
of short ones that queue behind them) grow with `--seconds`, Baton refuses what would wait too long (`admission`), and
servers are compared in overload. `--long-every` should be above *long, alone*: the first token of a long prompt on the
idle server. With both cores a prompt token takes 8 ms or so on a machine without bfloat16, 10 s for 1,200 tokens; one
engine of Baton has half of the cores and needs up to twice as long.

Figures are medians of the rounds with the least and the most. The aims: Baton's longest gap is no longer than
always-disaggregated's, but for noise (`--noise`, or how far the worst of always-disaggregated's own rounds is above
their median if that is more), and the median first token of short prompts is within 1.5 times of vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.mixed_traffic import as_stream, measure
from benchmarks.servers import ROOT, running
from benchmarks.streams import percentile
from kv_transfer.cores import BIND_ENV
from kv_transfer.engine_process import SPIN_ENV, WATCH_ENV
from kv_transfer.nixl import free_port
from runtime.config import Config
from runtime.config_file import load

SERVERS = ("vllm", "baton", "always")
FIRST_TOKEN_AIM = 1.5
ROWS = {
    "longest_gap_s": "longest gap of the streams, s",
    "p99_gap_s": "p99 gap of the streams, s",
    "itl_s": "median gap of the streams, s",
    "stream_tokens_per_s": "tokens/s of the streams",
    "short_p50_s": "short, first token, median, s",
    "short_p90_s": "short, first token, p90, s",
    "long_p50_s": "long, first token, median, s",
    "long_max_s": "long, first token, longest, s",
    "long_alone_s": "long, alone, first token, s",
    "unread": "long, unread at the end",
    "failed": "failed or refused",
}


def summary(record: dict[str, Any]) -> dict[str, float]:
    """The figures of one server in one round, by the names of `ROWS`."""
    asked = [(each["kind"], as_stream(each)) for each in record["asked"]]
    firsts = {kind: [s.first_s for k, s in asked if k == kind and s.first_s is not None] for kind in ("long", "short")}
    streams = [as_stream(each) for writer in record["streams"] for each in writer]
    gaps = [gap for s in streams for at, gap in zip(s.came_s[1:], s.gaps_s, strict=True) if at > 0]
    open_gaps = [record["end_s"] - s.came_s[-1] for s in streams if s.came_s and not s.whole and not s.trouble]
    unread = [s for kind, s in asked if kind == "long" and (not s.came_s or s.came_s[0] > record["traffic_s"])]
    wrote_s = record["end_s"] - min(stream.sent_s for stream in streams)
    return {
        "longest_gap_s": max([*gaps, *open_gaps], default=float("nan")),
        "p99_gap_s": percentile(gaps, 0.99),
        "itl_s": percentile(gaps, 0.5),
        "stream_tokens_per_s": sum(stream.tokens for stream in streams) / wrote_s,
        "short_p50_s": percentile(firsts["short"], 0.5),
        "short_p90_s": percentile(firsts["short"], 0.9),
        "long_p50_s": percentile(firsts["long"], 0.5),
        "long_max_s": max(firsts["long"], default=float("nan")),
        "long_alone_s": record["long_alone_s"],
        "unread": len(unread),
        "failed": sum(bool(stream.trouble) for stream in [*streams, *(stream for _, stream in asked)]),
    }


def vllm(config: Config, *, short_spin: bool) -> AbstractContextManager[str]:
    """vLLM's own server: one engine like those of Baton's prefill pool, with all cores."""
    settings, port = config.engine_settings("prefill"), free_port("127.0.0.1")
    module = "vllm.entrypoints.launchers.api_server.entry"
    line = [sys.executable, "-m", module, "--model", settings.model, "--host", "127.0.0.1", "--port", str(port)]
    env = {**settings.env, "OMP_NUM_THREADS": str(os.cpu_count() or 1), BIND_ENV: "nobind"}
    env.pop(SPIN_ENV, None)
    if short_spin:  # Baton's plugin acts in processes that belong to another one
        env |= {WATCH_ENV: str(os.getpid()), SPIN_ENV: settings.env[SPIN_ENV]}
    line += ["--disable-uvicorn-access-log", *flags(settings.args)]
    return running(line, "Application startup complete", port, env)


def flags(args: dict[str, Any]) -> Iterator[str]:
    """Engine arguments as vLLM's command line has them."""
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield f"--{flag}"
            words = value if isinstance(value, list) else [value]
            yield from (word if isinstance(word, str) else json.dumps(word) for word in words)


@contextmanager
def baton(path: Path, preset: str | None = None) -> Iterator[str]:
    """`baton serve` with a file's settings, or with another preset of routing."""
    settings, port = yaml.safe_load(path.read_text()), free_port("127.0.0.1")
    if preset:
        settings["routing"] = {**settings.get("routing", {}), "preset": preset}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(settings))
        line = [sys.executable, "-m", "runtime.cli", "serve", "--config", str(file), "--port", str(port)]
        with running(line, "ready: curl", port) as url:
            yield url


def run(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start each server in each round, and give the record of each."""
    config = load(given.config)
    servers: dict[str, Callable[[], AbstractContextManager[str]]] = {
        "vllm": lambda: vllm(config, short_spin=given.short_spin),
        "baton": lambda: baton(given.config),
        "always": lambda: baton(given.config, "always-disaggregated"),
    }
    for number in range(given.rounds):
        for name in given.servers if number % 2 == 0 else reversed(given.servers):
            began = time.perf_counter()
            with servers[name]() as url:
                start_s = time.perf_counter() - began
                record = asyncio.run(measure(url, config.model_name, given, number))
            yield {"server": name, "round": number, "start_s": start_s, **record}


def report(records: list[dict[str, Any]], noise: float) -> None:
    """Print the table, what went wrong, and the two ratios against their aims."""
    rounds = {name: [summary(r) for r in records if r["server"] == name] for name in SERVERS}
    rounds = {name: found for name, found in rounds.items() if found}
    print(f"{'':32}" + "".join(f"{name:>28}" for name in rounds))
    for row, title in ROWS.items():
        print(f"{title:32}" + "".join(f"{spread([each[row] for each in found]):>28}" for found in rounds.values()))
    for name in rounds:
        plans = sum((Counter(r["plans"]) for r in records if r["server"] == name), Counter[str]())
        for plan, count in plans.most_common():
            print(f"{name}: {count} x {plan}")
        streams = [s for r in records if r["server"] == name for s in [*r["asked"], *itertools.chain(*r["streams"])]]
        for trouble, count in Counter(s["trouble"] for s in streams if s["trouble"]).most_common(5):
            print(f"{name}: {count} x {trouble}")
    if {"baton", "always"} <= rounds.keys():
        gaps = [each["longest_gap_s"] for each in rounds["always"]]
        limit = max(1 + noise, max(gaps) / statistics.median(gaps))
        judge("longest gap, baton / always", rounds["baton"], rounds["always"], "longest_gap_s", limit)
    if {"baton", "vllm"} <= rounds.keys():
        judge("short, first token, baton / vllm", rounds["baton"], rounds["vllm"], "short_p50_s", FIRST_TOKEN_AIM)


def judge(title: str, ours: list[dict[str, float]], theirs: list[dict[str, float]], row: str, limit: float) -> None:
    """Print a ratio of medians, that of each round, and whether it keeps its limit; failed requests make it void."""
    ratio = statistics.median(each[row] for each in ours) / statistics.median(each[row] for each in theirs)
    each_round = ", ".join(f"{our[row] / their[row]:.2f}" for our, their in zip(ours, theirs, strict=False))
    failed = sum(each["failed"] for each in [*ours, *theirs])
    verdict = f"void: {failed} requests failed" if failed else "pass" if ratio <= limit else "FAIL"
    print(f"{title}: {ratio:.2f} (rounds {each_round}; aim: at most {limit:.2f}) {verdict}")


def spread(values: list[float]) -> str:
    """Median with the least and the most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Run the rounds, or report on those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic, for each server in each round")
    parser.add_argument("--streams", type=int, default=2, help="that write all the time")
    parser.add_argument("--stream-answer", type=int, default=200, help="tokens, until the next answer begins")
    parser.add_argument("--long-tokens", type=int, default=1200, help="of a long prompt")
    parser.add_argument("--long-every", type=float, default=5.0, help="seconds between two of them")
    parser.add_argument("--long-answer", type=int, default=20, help="tokens")
    parser.add_argument("--short-tokens", type=int, default=60, help="of a short prompt, and of a stream's")
    parser.add_argument("--short-every", type=float, default=1.5, help="seconds between two of them")
    parser.add_argument("--short-answer", type=int, default=16, help="tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--short-spin", action="store_true", help="vLLM's processes poll as briefly as Baton's engines")
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/config/demo.yaml")
    parser.add_argument("--noise", type=float, default=0.1, help="what two equal servers may differ by, as a part")
    parser.add_argument("--out", type=Path, help="write all that was seen here (JSON), after each server")
    parser.add_argument("--report", type=Path, help="print the table of such a file, and run nothing")
    given = parser.parse_args()
    if given.report:
        report(json.loads(given.report.read_text())["records"], given.noise)
        return
    asked = {name: value for name, value in vars(given).items() if name not in ("out", "report")}
    records: list[dict[str, Any]] = []
    for record in run(given):
        records.append(record)
        figures = "  ".join(f"{row} {value:.3g}" for row, value in summary(record).items())
        print(f"round {record['round']} {record['server']}: {figures}", flush=True)
        if given.out:
            given.out.write_text(json.dumps({"asked": asked, "records": records}, default=str))
    report(records, given.noise)


if __name__ == "__main__":
    main()
