"""Baton's own metrics, beside those that vLLM's front end exports."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from kv_transfer.handoff import InvalidHandoff
from runtime.errors import STATUS, LegFailed, PullFailed, WorkerDrained, WorkerLost
from runtime.policy.admission import CLASSES

PLANS = Counter("baton_plans_total", "Requests by the plan they were given and why.", ["plan", "reason"])
WORKERS_LOST = Counter(
    "baton_workers_lost_total", "Workers that were lost without having been asked to leave, by pool.", ["pool"]
)
TTFT_OVER_PREDICTED = Histogram(
    "baton_ttft_over_predicted",
    "Time from a plan to the first token, as a multiple of what the plan predicted.",
    buckets=(0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0),
)
RECOVERIES = Counter(
    "baton_recoveries_total",
    "Requests that went on after a loss, by kind (retried before the first token, resumed after it) and fault.",
    ["kind", "fault"],
)
REFUSALS = Counter("baton_refusals_total", "Requests that were refused before their response started.", ["reason"])
WAITING_REQUESTS = Gauge("baton_waiting_requests", "Requests that wait at the front end, by priority.", ["priority"])
WAITING_TOKENS = Gauge("baton_waiting_tokens", "Prompt tokens that wait at the front end, by priority.", ["priority"])
WAITED_SECONDS = Histogram(
    "baton_waiting_seconds",
    "Seconds from a request's arrival at the queue until it was let in, by priority.",
    ["priority"],
    buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
TENANT_TOKENS = Counter(
    "baton_tenant_tokens_total",
    "Prompt and answer tokens by tenant: those with a name in the settings, and all others together.",
    ["tenant"],
)
SET_ASIDE = Counter(
    "baton_workers_set_aside_total", "Workers that failed in a row and got no traffic until a probe worked.", ["role"]
)

# A counter that begins with its first event hides it from `increase`: they are all there from the start.
for _pool in ("prefill", "decode"):
    WORKERS_LOST.labels(pool=_pool)
    SET_ASIDE.labels(role=_pool)
for _reason in STATUS:
    REFUSALS.labels(reason=_reason)
for _fault in (WorkerLost, WorkerDrained, LegFailed, PullFailed, InvalidHandoff):
    RECOVERIES.labels(kind="retried", fault=_fault.__name__)
    RECOVERIES.labels(kind="resumed", fault=_fault.__name__)
for _priority in CLASSES:
    WAITING_REQUESTS.labels(_priority)
    WAITING_TOKENS.labels(_priority)
