"""What is measured of clients, what a scrape of the whole fleet says, and that the page agrees with the code."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kv_transfer.gpu_memory import GpuMemory
from kv_transfer.worker_endpoint import WorkerMetrics, is_engine_family
from runtime.brain import percentile
from runtime.client_view import BOUNDS_S, ClientView, StreamClock, Times
from runtime.fleet_metrics import fetch_text, merged
from runtime.metric_reference import ADVICE, VLLM, families, reference
from runtime.policy.objectives import PRESETS, Objectives
from runtime.policy.types import Disaggregated, Local, Predicted

ROOT = Path(__file__).parent.parent.parent


def samples(collector: object) -> dict[str, float]:
    """All samples of a collector, by name and label values."""
    registry = CollectorRegistry()
    registry.register(collector)  # type: ignore[arg-type]
    parsed = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value for family in parsed for sample in family.samples
    }


def test_page_and_code_agree() -> None:
    """docs/metrics.md is what `make docs` writes, and each family has its advice."""
    assert set(families()) == set(ADVICE), "every family needs a row in runtime/metric_reference.py"
    assert (ROOT / "docs/metrics.md").read_text() == reference(), "run `make docs`"


def test_a_streams_times() -> None:
    """TTFT from arrival, each token's time, the longest gap, and both objectives' misses."""
    seen = ClientView(Objectives(ttft_s=1.0, itl_s=0.1))
    clock = StreamClock(arrived_s=100.0)
    for now, count in ((101.5, 1), (101.55, 1), (102.15, 3), (102.2, 1)):
        seen.tokens(clock, count, now)
    seen.ended(clock, "done", 102.2)
    found = samples(seen)
    assert found["baton_time_to_first_token_seconds_sum"] == pytest.approx(1.5)
    assert found["baton_inter_token_seconds_count"] == 5
    assert found["baton_inter_token_seconds_sum"] == pytest.approx(0.7)
    assert found["baton_longest_gap_seconds_sum"] == pytest.approx(0.6)
    assert found["baton_request_seconds_sum"] == pytest.approx(2.2)
    assert found["baton_requests_total done"] == 1
    assert found["baton_objective_missed_total ttft"] == 1
    assert found["baton_objective_missed_total itl"] == 1


def test_a_request_without_tokens_counts_as_ended_only() -> None:
    """A refused or failed request has no times."""
    seen = ClientView()
    seen.ended(StreamClock(arrived_s=0.0), "refused", 5.0)
    found = samples(seen)
    assert found["baton_requests_total refused"] == 1
    assert found["baton_request_seconds_count"] == 0
    assert found["baton_longest_gap_seconds_count"] == 0


def test_tokens_are_counted_for_the_pool_whose_work_they_are() -> None:
    """Own work, lent work, and what is read next to the streams because it is short."""
    seen = ClientView()
    predicted = Predicted(0.1, 0.01, 0.01, uncached_tokens=30, pulled_tokens=0, measured=True)
    clock = StreamClock(0.0)
    seen.planned(clock, Disaggregated("p", "d", predicted=predicted), 100, on_prefill=False)
    seen.planned(clock, Disaggregated("p", "d"), 100, on_prefill=False)
    seen.planned(clock, Local("d", "decode_idle"), 7, on_prefill=False)
    seen.planned(clock, Local("d", "short_prompt"), 5, on_prefill=False)
    seen.tokens(clock, 4, 1.0)
    seen.planned(clock, Local("p", "decode_behind"), 3, on_prefill=True)
    seen.tokens(clock, 2, 2.0)
    totals = seen.totals
    assert (totals.read, totals.read_for_prefill, totals.read_by_decode) == (133, 7, 5)
    assert (totals.written, totals.written_by_prefill) == (6, 2)


@pytest.mark.parametrize(("part", "value"), [(0.5, 0.02), (0.9, 0.1), (1.0, 0.1)])
def test_percentiles(part: float, value: float) -> None:
    """Within a bucket by proportion; nothing counted has none."""
    times = Times()
    times.observe(0.018, 50)
    times.observe(0.09, 50)
    found = percentile(times.counts, part)
    assert found is not None
    assert abs(found - value) <= 0.025
    assert percentile(Times().counts, part) is None


def test_the_objectives_are_bounds_of_buckets() -> None:
    """So that a histogram says exactly how many requests kept a preset's limit."""
    assert {limit for preset in PRESETS.values() for limit in (preset.ttft_s, preset.itl_s)} <= {*BOUNDS_S, 0.08, 0.175}


WORKER = """# HELP vllm:kv_cache_usage_perc Usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
# HELP baton_worker_pulls_total Pulls.
# TYPE baton_worker_pulls_total counter
baton_worker_pulls_total 3.0
"""


async def test_a_scrape_of_many_is_one_valid_text() -> None:
    """Each family once, with its head, and each line with the labels of where it is from."""
    own = "# HELP baton_plans_total Plans.\n# TYPE baton_plans_total counter\nbaton_plans_total 1.0\n"
    text = await merged([('front_end="f"', own), *((f'worker="{n}",pool="decode"', WORKER) for n in "ab")])
    parsed = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(parsed) == {"baton_plans", "vllm:kv_cache_usage_perc", "baton_worker_pulls"}
    assert text.count("# TYPE") == 3
    assert parsed["baton_plans"].samples[0].labels == {"front_end": "f"}
    labels = [sample.labels for sample in parsed["vllm:kv_cache_usage_perc"].samples]
    assert labels == [{"worker": n, "pool": "decode", "engine": "0"} for n in "ab"]
    assert [sample.labels for sample in parsed["baton_worker_pulls"].samples] == [
        {"worker": n, "pool": "decode"} for n in "ab"
    ]


async def test_a_hundred_workers_cost_little() -> None:
    """A scrape each 15 s of a hundred workers with 100 lines each may take 1% of a core: 0.15 s."""
    big = "".join(f"# HELP m{n} x\n# TYPE m{n} gauge\n" + f'm{n}{{a="b"}} 1\n' * 8 for n in range(10))
    best = 1.0
    for _ in range(3):
        started = time.process_time()
        await merged([(f'worker="{n}"', big) for n in range(100)])
        best = min(best, time.process_time() - started)
    assert best < 0.15


async def test_a_worker_tells_its_own() -> None:
    """Over HTTP, from the engine's counts, on a port of its own; nothing of other families."""
    loop_counts = {"pulls": 3, "pulled_bytes": 99, "leases_expired": 1}
    metrics = WorkerMetrics(lambda: loop_counts, {"engine": 2.5}, lambda: {"0": (90, 100)})
    port = metrics.serve("127.0.0.1")
    try:
        text = await fetch_text("127.0.0.1", port)
    finally:
        metrics.close()
    assert "baton_worker_pulled_bytes_total 99.0" in text
    assert 'baton_worker_start_seconds{phase="engine"} 2.5' in text
    assert 'baton_gpu_memory_used_bytes{gpu="0"} 90.0' in text
    assert "python_info" not in text
    with pytest.raises(OSError):
        await fetch_text("127.0.0.1", port)


def test_gpu_memory_comes_from_nvml() -> None:
    """By index or UUID; a driver that fails costs only the metric."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1, total=handle if isinstance(handle, int) else 9),
    )
    assert GpuMemory(["3", "GPU-ab"], nvml).read() == {"3": (1, 3), "GPU-ab": (1, 9)}
    assert GpuMemory([], nvml).read() == {}

    def fails() -> None:
        raise RuntimeError("no driver")

    assert GpuMemory(["0"], SimpleNamespace(nvmlInit=fails)).read() == {}


def test_engine_families_are_told_by_workers_alone() -> None:
    """What the front end's vLLM would say of a core that it does not have is left out there."""
    assert is_engine_family("vllm:num_requests_running")
    assert is_engine_family("vllm:nixl_xfer_time_seconds")
    assert not is_engine_family("vllm:time_to_first_token_seconds")
    documented = [name for name in VLLM if is_engine_family(name)]
    assert len(documented) == 12
