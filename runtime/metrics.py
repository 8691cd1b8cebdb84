"""Baton's own metrics, beside those that vLLM's front end exports."""

from __future__ import annotations

from prometheus_client import Counter

PLANS = Counter("baton_plans_total", "Requests by the plan they were given and why.", ["plan", "reason"])
RECOVERIES = Counter(
    "baton_recoveries_total",
    "Requests that went on after a loss, by kind (retried before the first token, resumed after it) and fault.",
    ["kind", "fault"],
)
