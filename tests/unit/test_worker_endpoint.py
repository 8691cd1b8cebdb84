"""What a real engine's worker exports: vLLM's own logger, fed with what comes with each engine step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from kv_transfer.vllm_engine import build_vllm_config
from kv_transfer.worker_endpoint import WorkerMetrics, is_engine_family
from runtime.config_file import parse
from runtime.metric_reference import VLLM


def test_each_engine_step_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's figures and NIXL's are there under vLLM's names, all that the page promises of a worker."""
    settings = parse({"model": "demo"}).engine_settings("decode")
    transport = settings.transport.model_copy(update={"host": "127.0.0.1"})
    for name, value in settings.env.items():
        monkeypatch.setenv(name, value)
    metrics = WorkerMetrics(dict, {}, dict)
    metrics.describe_engine(build_vllm_config(settings.model_copy(update={"transport": transport})))
    pulls = NixlKVConnectorStats()
    pulls.reset()
    pulls.data.update(transfer_duration=[0.01], post_duration=[0.001], bytes_transferred=[1000], num_descriptors=[3])
    stats = SchedulerStats(num_running_reqs=2, num_waiting_reqs=1, kv_cache_usage=0.4, kv_connector_stats=pulls.data)
    metrics.stepped(SimpleNamespace(scheduler_stats=stats))  # type: ignore[arg-type]
    metrics.stepped(SimpleNamespace(scheduler_stats=None))  # type: ignore[arg-type]
    registry = CollectorRegistry()
    registry.register(metrics)  # type: ignore[arg-type]
    try:
        found = {f.name: f.samples for f in text_string_to_metric_families(generate_latest(registry).decode())}
    finally:
        unregister_vllm_metrics()
    assert found["vllm:num_requests_running"][0].value == 2
    assert found["vllm:num_requests_waiting"][0].value == 1
    assert found["vllm:kv_cache_usage_perc"][0].value == 0.4
    assert {s.name: s.value for s in found["vllm:nixl_bytes_transferred"]}["vllm:nixl_bytes_transferred_sum"] == 1000
    assert {name for name in VLLM if is_engine_family(name)} <= set(found)
    assert "vllm:time_to_first_token_seconds" not in found
