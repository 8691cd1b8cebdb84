"""What it costs a front end to be scraped and to have the pools sized: 100 workers, half of them prefill.

    python -m benchmarks.scraping

Workers' `/metrics` are real ones (vLLM's logger and Baton's own), all served by one other process. Measured is the CPU
time of the front end's process, all of its threads: for a scrape of the whole fleet, and for what it does each second
about scaling: its report, packed as it travels, and the decision, which a front end makes itself only where it is alone
and nothing scales. Ray Serve's part of the call that carries the report is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import pickle
import statistics
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY

from kv_transfer.costs import Cost
from kv_transfer.engine import EngineFacts
from kv_transfer.load import Load, News
from kv_transfer.worker_endpoint import WorkerMetrics
from runtime.account import Account
from runtime.brain import Brain
from runtime.client_view import ClientView
from runtime.demo_model import demo_model_dir
from runtime.fleet_metrics import FleetMetrics
from runtime.policy.pool import Pool
from runtime.policy.scaling_records import PoolBounds, ScalingSettings
from runtime.policy.types import Snapshot
from runtime.pool_metrics import PoolMetrics
from runtime.reports import report
from runtime.worker import State

SCRAPE_S, REPORT_S = 15.0, 1.0
"""How often Prometheus asks, by the usual settings, and how often a front end reports."""

AIM = 0.01
"""The part of a core that both may take."""

HOST = "127.0.0.1"
SETTINGS = ScalingSettings(PoolBounds(1, 100), PoolBounds(1, 100))


def export_vllms() -> None:
    """Put into this process' registry what vLLM exports in a worker or in a front end."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    PrometheusStatLogger(AsyncEngineArgs(model=str(demo_model_dir()), max_model_len=8192).create_engine_config())


def serve_workers(count: int, ports: Connection) -> None:
    """So many endpoints, until this process is ended."""
    export_vllms()
    found = [WorkerMetrics(dict, {"engine": 60.0}, dict) for _ in range(count)]
    ports.send([metrics.serve(HOST) for metrics in found])
    ports.recv()  # nothing: the pipe closes


def facts(number: int, port: int) -> EngineFacts:
    """One worker of either pool."""
    role = ("prefill", "decode")[number % 2]
    return EngineFacts(
        *(f"{number:032x}", role, "/m", "bfloat16", "auto", 16, 1, 8192, 8192, HOST, 5600 + number),
        metrics_port=port,
        max_streams=256,
        max_step_tokens=2048,
    )


def busy_cluster(workers: list[EngineFacts]) -> Any:
    """As much of a cluster as reports and metrics look at, with something to do everywhere."""
    load = Load(4096, 2, 20, 512, 4000, Cost(0.01, 1e-4), Cost(0.01, 5e-4), Cost(0.005, 1e-6))
    pools: dict[str, list[Any]] = {"prefill": [], "decode": []}
    for one in workers:
        account = Account(one)
        account.news(News(load, 0))
        pools[one.role].append(account.view())
    snapshot = Snapshot(Pool(pools["prefill"]), Pool(pools["decode"]))
    linked = {
        one.engine_id: SimpleNamespace(
            link=SimpleNamespace(facts=one), state=State.READY, start_s={"connect": 0.1, "warm": 2.0}
        )
        for one in workers
    }
    return SimpleNamespace(
        fleet=SimpleNamespace(workers=linked, snapshot=lambda: snapshot),
        ledger=SimpleNamespace(oldest_s=lambda: 0.1, pinned_blocks=lambda: Counter(dict.fromkeys(linked, 10))),
        waiting=lambda: (3, 2000),
        seen=ClientView(),
    )


def cpu_s(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of a piece of work: the median."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def main() -> None:
    """Measure both and say what part of a core they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    endpoints = context.Process(target=serve_workers, args=(arguments.workers, theirs), daemon=True)
    endpoints.start()
    theirs.close()
    workers = [facts(number, port) for number, port in enumerate(ours.recv())]
    export_vllms()
    cluster, brain = busy_cluster(workers), Brain(SETTINGS, {})
    brain.tell(report("a", cluster), 0.0)
    status = brain.decide(0.0)
    reporter: Any = SimpleNamespace(believed=lambda: status)
    for collector in (cluster.seen, PoolMetrics(cluster, reporter)):
        REGISTRY.register(collector)  # type: ignore[arg-type]
    metrics = FleetMetrics(lambda: workers, lambda: (), "a")
    loop, texts, now = asyncio.new_event_loop(), [""], iter(range(1, 1_000_000))

    def scrape() -> None:
        texts[0] = loop.run_until_complete(metrics._gather())

    def decide() -> None:
        second = float(next(now))
        brain.tell(pickle.loads(pickle.dumps(report("a", cluster))), second)
        brain.decide(second)

    scrape()
    seconds = {
        "scrape": (cpu_s(scrape, arguments.rounds), SCRAPE_S),
        "report and decide": (cpu_s(decide, 200), REPORT_S),
    }
    loop.close()
    endpoints.terminate()
    print(f"{arguments.workers} workers, {len(texts[0].splitlines())} lines, {len(texts[0]) / 1e6:.1f} MB a scrape")
    for name, (taken, period) in seconds.items():
        print(f"{name}: {1000 * taken:.1f} ms of CPU every {period:g} s, {taken / period:.2%} of a core")
    print(f"together {sum(taken / period for taken, period in seconds.values()):.2%}; aim: under {AIM:.0%}")


if __name__ == "__main__":
    main()
