"""The reference of all metrics, generated from the code: `python -m runtime.metric_reference`.

Names, types, labels and texts are those of the families themselves; `ADVICE` adds the unit and what to do.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from prometheus_client import REGISTRY

from kv_transfer.worker_endpoint import WorkerMetrics
from runtime.client_view import ClientView
from runtime.pool_metrics import PoolMetrics

HEAD = """# Metrics

`/metrics` of a front end has everything: its own families and those of the other front ends (label `front_end`), and
those of every worker (labels `worker` and `pool`). Each worker also serves its own, at the host of its side channel and
a free port (`metrics_port` in its facts). This page is generated from the code by `make docs`.

Where Prometheus scrapes several front ends, each of them tells all of this, so that a series is there once for each
(label `instance`). Take the `max` before you add up: `sum(max by (worker) (vllm:num_requests_running))`,
`sum(max by (front_end) (rate(baton_requests_total{outcome="done"}[5m])))`. Ratios of two sums need no such care.

Label values are bounded: pools, states, reasons and kinds are closed sets in the code; `worker` has a value for each
living worker.
"""

ADVICE: dict[str, tuple[str, str]] = {
    "baton_answer_tokens": ("tokens", 'Tokens by `pool="prefill"` are borrowed work: decode is behind.'),
    "baton_gpu_memory_total_bytes": ("bytes", "-"),
    "baton_gpu_memory_used_bytes": (
        "bytes",
        "Lower `engine_args.gpu_memory_utilization`, or see who else uses the GPU.",
    ),
    "baton_handoff_oldest_seconds": (
        "seconds",
        "Decode workers don't pull: see their logs and the network between pools.",
    ),
    "baton_handoff_seconds": (
        "seconds",
        "The network between the pools is slow, or decode workers have no free blocks.",
    ),
    "baton_handoffs_outstanding": ("handoffs", "Decode is behind: more decode workers, or smaller prompts."),
    "baton_handoffs_released": ("handoffs", "`lost`: workers die or pulls fail. `abandoned`: clients leave early."),
    "baton_inter_token_seconds": ("seconds", "More decode workers; shorter steps; fewer prompts read beside streams."),
    "baton_longest_gap_seconds": ("seconds", "Prompts are read beside streams, or streams resume after deaths."),
    "baton_objective_missed": ("requests", "See the alert of the same objective in docs/operations.md."),
    "baton_objective_seconds": ("seconds", "A setting (`objectives`)."),
    "baton_plans": (
        "requests",
        "The share of a reason tells what routing had to do: `over_limits` means too few workers.",
    ),
    "baton_pool_backlog_seconds": ("seconds", "The pool is too small: raise its `max`, or see why it does not grow."),
    "baton_pool_desired_replicas": (
        "workers",
        "What KEDA, KubeRay and Ray Serve follow; `baton_pool_reason` says why.",
    ),
    "baton_pool_kv_use_ratio": ("0 to 1", "More decode workers; prefill: handoffs are not pulled."),
    "baton_pool_queue_depth": ("requests", "As for the backlog."),
    "baton_pool_reason": ("0 or 1", "`maximum` and `budget`: the load asks for more than it may get."),
    "baton_pool_streams": ("requests", "More decode workers."),
    "baton_pool_workers": (
        "workers",
        "`warming` or `connecting` for long: see the workers' logs. `refused`: incompatible.",
    ),
    "baton_prompt_tokens": ("tokens", '`lent="yes"` is prefill\'s work that decode did: prefill is behind.'),
    "baton_recoveries": ("requests", "Workers die or pulls fail: see `baton_workers_lost` and the workers' logs."),
    "baton_refusals": (
        "requests",
        "Too little capacity for `overloaded`, `deadline` and `no_workers`; the others are the clients'.",
    ),
    "baton_request_seconds": ("seconds", "Long answers, or one of the two latencies."),
    "baton_requests": ("requests", "`failed`: see the front end's log. `refused`: too little capacity."),
    "baton_tenant_tokens": ("tokens", "This tenant has most of the fleet: its weight and the others' are settings."),
    "baton_time_to_first_token_seconds": ("seconds", "Prefill is behind (backlog), or prompts are long."),
    "baton_ttft_over_predicted": (
        "measured / predicted",
        "Far from 1 for long: placement predicts badly. See `baton explain` and the log lines of `baton.placement`.",
    ),
    "baton_waiting_requests": ("requests", "More arrives than the pools can take: see `baton_pool_queue_depth`."),
    "baton_waiting_seconds": ("seconds", "As above; a class with a lower priority waits longer."),
    "baton_waiting_tokens": ("tokens", "As above."),
    "baton_workers_set_aside": ("workers", "Legs fail on them one after the other: see the workers' logs."),
    "baton_worker_failed_tasks": (
        "tasks",
        "See the worker's log. A watch that failed does not come back: replace the worker.",
    ),
    "baton_worker_failed_transfers": ("transfers", "The network between the pools; NIXL's log on the worker."),
    "baton_worker_leases_expired": (
        "handoffs",
        "Nobody released what was read: a front end died, or decode stood still.",
    ),
    "baton_worker_orphans": ("handoffs", "Front ends die or lose their link: see their logs."),
    "baton_worker_prompt_tokens_computed": ("tokens", "Little prefix caching; normal for new prompts."),
    "baton_worker_pulled_bytes": ("bytes", "Long prompts; compare with the network's bandwidth."),
    "baton_worker_pulls": ("handoffs", "-"),
    "baton_worker_pulls_hung": ("pulls", "The network between the pools drops packets; see NIXL's log on the worker."),
    "baton_worker_start_seconds": (
        "seconds",
        "`engine`: loading and compiling the model. `warm`: first uses of each path.",
    ),
    "baton_workers_lost": ("workers", "They crash or are killed: see their logs, and the node's for memory."),
}
"""The unit of each family, and what to do when it is high."""

VLLM: dict[str, tuple[str, str, str]] = {
    "vllm:num_requests_running": ("gauge", "requests", "Requests in the engine's batch."),
    "vllm:num_requests_waiting": ("gauge", "requests", "Requests in the engine's queue: the pool is behind."),
    "vllm:num_requests_kv_fetch_by_stage": ("gauge", "requests", "Decode requests whose blocks are on their way."),
    "vllm:kv_cache_usage_perc": ("gauge", "0 to 1", "KV blocks in use; near 1 requests wait or are preempted."),
    "vllm:prefix_cache_queries": ("counter", "tokens", "Prompt tokens that were looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("counter", "tokens", "Prompt tokens that were found there."),
    "vllm:external_prefix_cache_queries": ("counter", "tokens", "Prompt tokens that could have been pulled."),
    "vllm:external_prefix_cache_hits": ("counter", "tokens", "Prompt tokens that were pulled."),
    "vllm:nixl_xfer_time_seconds": ("histogram", "seconds", "One transfer: the network between the pools."),
    "vllm:nixl_bytes_transferred": ("histogram", "bytes", "Size of a transfer."),
    "vllm:nixl_num_failed_transfers": ("counter", "transfers", "See the worker's log."),
    "vllm:nixl_num_kv_expired_reqs": ("counter", "requests", "Leases that ran out."),
    "vllm:time_to_first_token_seconds": ("histogram", "seconds", "At the front end: both pools and the way between."),
    "vllm:inter_token_latency_seconds": ("histogram", "seconds", "At the front end."),
    "vllm:request_time_per_output_token_seconds": ("histogram", "seconds", "Mean of a request, at the front end."),
    "vllm:e2e_request_latency_seconds": ("histogram", "seconds", "At the front end."),
    "vllm:prompt_tokens": ("counter", "tokens", "At the front end."),
    "vllm:generation_tokens": ("counter", "tokens", "At the front end."),
    "vllm:request_success": ("counter", "requests", "By reason of the end, at the front end."),
}
"""vLLM's families that one looks at first. `vllm:nixl_*` come from real engines only."""

BLOG_NAMES = {
    "vllm_queue_depth": "`vllm:num_requests_waiting` of one engine; `baton_pool_queue_depth` of a pool",
    "vllm_gpu_memory_usage": "`baton_gpu_memory_used_bytes / baton_gpu_memory_total_bytes`; KV alone: "
    "`vllm:kv_cache_usage_perc`",
    "vllm_time_to_first_token": "`vllm:time_to_first_token_seconds`, `baton_time_to_first_token_seconds`",
    "vllm_inter_token_latency": "`vllm:inter_token_latency_seconds`, `baton_inter_token_seconds`",
}
"""Names that blog posts use and that vLLM does not have, and what to use."""


class Family(NamedTuple):
    """A family as the code has it. Counters are named without `_total`."""

    kind: str
    text: str
    labels: tuple[str, ...]


def families() -> dict[str, Family]:
    """Baton's families by name."""
    for package in ("runtime", "kv_transfer"):
        for path in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            if "from prometheus_client import" in path.read_text():
                importlib.import_module(f"{package}.{path.stem}")
    found: dict[str, Family] = {}
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("baton_"):
            _add(found, collector._name, collector._type, collector._documentation, collector._labelnames)  # type: ignore[attr-defined]
    cluster: Any = SimpleNamespace(
        fleet=SimpleNamespace(workers={}), seen=ClientView(), ledger=SimpleNamespace(oldest_s=lambda: 0.0)
    )
    pools = PoolMetrics(cluster, SimpleNamespace(believed=lambda: None))  # type: ignore[arg-type]
    worker = WorkerMetrics(dict, {}, dict)
    for family in [*cluster.seen.collect(), *pools.collect(), *worker.collect()]:
        if family.name.startswith("baton_"):
            _add(found, family.name, family.type, family.documentation, family._labelnames)  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def series_of(name: str, kind: str) -> set[str]:
    """The names under which a family is exposed. Counters are named without `_total`."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
    return {name + suffix for suffix in suffixes}


def _add(found: dict[str, Family], name: str, kind: str, text: str, labels: Any) -> None:
    known = found.get(name, Family(kind, text, ()))
    found[name] = Family(kind, known.text, tuple(sorted({*known.labels, *labels})))


def reference() -> str:
    """The page, in Markdown."""
    rows = [
        HEAD,
        "## Baton's own\n",
        "| name | type | unit | labels | meaning | when high |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in families().items():
        unit, advice = ADVICE[name]
        shown = name + "_total" if family.kind == "counter" else name
        labels = ", ".join(f"`{label}`" for label in family.labels) or "-"
        rows.append(f"| `{shown}` | {family.kind} | {unit} | {labels} | {family.text} | {advice} |")
    rows += ["\n## vLLM's\n", "| name | type | unit | meaning |", "|---|---|---|---|"]
    for name, (kind, unit, text) in VLLM.items():
        rows.append(f"| `{name}{'_total' if kind == 'counter' else ''}` | {kind} | {unit} | {text} |")
    rows += ["\n## Names that vLLM does not have\n", "| in blog posts | use |", "|---|---|"]
    rows += [f"| `{name}` | {use} |" for name, use in BLOG_NAMES.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
