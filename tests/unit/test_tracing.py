"""Spans of plans, by OpenTelemetry's own SDK."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.sampling_params import SamplingParams

from runtime.cache_view import CacheView
from runtime.placement import Placement, line
from runtime.policy.types import PRESETS, Snapshot, WorkerView
from tests.unit.test_resume import engine_request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SNAPSHOT = Snapshot((WorkerView("p", 0, 0),), (WorkerView("d", 0, 0),))


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where this process' spans go."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.mark.parametrize("traced", [True, False])
def test_a_plan_is_a_span_of_the_clients_trace(exporter: InMemorySpanExporter, traced: bool) -> None:
    """From the decision to the first token, with all that the log line says; nothing unless the settings ask for it."""
    exporter.clear()
    placement = Placement(PRESETS["always-disaggregated"], CacheView(1000), traced=traced)
    request = engine_request(SamplingParams(max_tokens=5), prompt_token_ids=[1, 2, 3])
    request.trace_headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    look = placement.look(request, [], SNAPSHOT)
    placement.chose(request, [], look, look.plan)
    placement.first_token(request.request_id)
    placement.first_token(request.request_id)
    spans = exporter.get_finished_spans()
    assert len(spans) == traced
    for span in spans:
        decided = placement.find(request.request_id)
        assert decided is not None and decided.first_token_s is not None and span.parent is not None
        assert (span.name, f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (
            "baton.plan",
            TRACE,
            PARENT,
        )
        assert (span.end_time or 0) - (span.start_time or 0) == pytest.approx(decided.first_token_s * 1e9, abs=1000)
        told = dict(field.split("=") for field in line(decided).split())
        assert {name.removeprefix("baton.") for name in span.attributes or {}} == set(told)
        assert (span.attributes or {})["baton.plan"] == told["plan"] == "disaggregated"
