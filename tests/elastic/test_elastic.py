"""Pools that scale, on real Ray: they grow with the load, shrink after it, and lose nothing; every metric is there."""

from __future__ import annotations

import asyncio
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.elastic import Phase, Run, run
from runtime.metric_reference import VLLM, families
from tests.conftest import Server, wait_for
from tests.elastic.conftest import GROWS_WITHIN_S, SHRINKS_WITHIN_S

WITH_A_GPU_ONLY = {"baton_gpu_memory_used_bytes", "baton_gpu_memory_total_bytes"}

REAL_ENGINES_ONLY = ("vllm:nixl_", "vllm:num_requests_kv_fetch_by_stage")
"""What only a real engine's connector counts."""


def test_pools_follow_the_load(elastic: Server) -> None:
    """Ten times the load and back: both pools grow and shrink on their own, and every stream ends as it should."""

    def grown(so_far: Run) -> bool:
        return min(so_far.most("prefill"), so_far.most("decode")) >= 2

    def small(so_far: Run) -> bool:
        last = so_far.samples[-1]
        return all(last[pool]["ready"] == last[pool]["desired"] == 1 for pool in ("prefill", "decode"))

    step = [Phase(10, 0.2), Phase(GROWS_WITHIN_S, 2.0, grown), Phase(SHRINKS_WITHIN_S, 0.2, small)]
    seen = asyncio.run(run(elastic.url, step))
    assert not seen.failed
    assert seen.samples[0]["prefill"]["ready"] == seen.samples[0]["decode"]["ready"] == 1
    assert grown(seen), [(s["at_s"], s["prefill"], s["decode"]) for s in seen.samples[::20]]
    assert small(seen), [(s["at_s"], s["prefill"], s["decode"]) for s in seen.samples[::20]]


def test_every_documented_metric_is_scraped(elastic: Server) -> None:
    """One scrape of the front end has all families with data, and the desired replicas are what the fleet says."""
    asyncio.run(run(elastic.url, [Phase(3, 2.0)]))
    pattern = re.compile(r"vllm:num_requests_running\{worker=")
    assert wait_for(lambda: bool(pattern.search(elastic.client.get("/metrics").text)), 60)
    text = elastic.client.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    expected = set(families()) - WITH_A_GPU_ONLY
    assert not {name for name in expected if name not in found or not found[name].samples}
    assert not {name for name in VLLM if name not in found and not name.startswith(REAL_ENGINES_ONLY)}
    workers = {s.labels["worker"] for s in found["vllm:kv_cache_usage_perc"].samples}
    assert len(workers) == len(found["vllm:kv_cache_usage_perc"].samples) >= 2
    answers = {
        pool: state["answer"]["workers"] for pool, state in elastic.client.get("/baton/fleet").json()["pools"].items()
    }
    assert {s.labels["pool"]: s.value for s in found["baton_pool_desired_replicas"].samples} == answers
    assert httpx.get(elastic.url + "/metrics").headers["content-type"].startswith("text/plain")
