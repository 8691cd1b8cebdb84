"""Spans of plans, beside those that vLLM's front end makes of requests (`front_end.otlp_traces_endpoint`)."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.tracing import SpanKind, extract_trace_context, instrument_manual

NANOSECONDS = 1e9


def plan_span(
    began: float, seconds: float, headers: Mapping[str, str] | None, facts: Mapping[str, str | int | float]
) -> None:
    """Tell of a plan and what came of it, as a span from the decision to the first token.

    Args:
        began: seconds since the epoch.
        headers: the client's trace headers, if it sent any: the span belongs to its trace.
        facts: what `runtime.placement.facts` says of the decision; attributes `baton.*`.
    """
    instrument_manual(
        span_name="baton.plan",
        start_time=int(began * NANOSECONDS),
        end_time=int((began + seconds) * NANOSECONDS),
        attributes={f"baton.{name}": value for name, value in facts.items()},
        context=extract_trace_context(headers),
        kind=SpanKind.INTERNAL,
    )
