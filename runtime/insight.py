"""What a front end tells of its decisions: `GET /baton/explain`, and `placement` in `GET /baton/fleet`.

The JSON of `placement` is stable. Its fields are described in `docs/placement.md`; new ones may come, none change their
meaning while `version` stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from runtime.placement import Decided, Placement
from runtime.policy.routing import REASONS, explain
from runtime.policy.types import Cost, Disaggregated, Plan, Refused, RequestView, RoutingSettings, Snapshot, WorkerView

if TYPE_CHECKING:
    from runtime.cluster import Cluster
    from runtime.worker import Worker

VERSION = 1

INSIGHT_PATHS = ("/baton/fleet", "/baton/explain")
"""Paths that tell of the inside: with API keys they need one, without they answer loopback only."""


def explain_route(cluster: Cluster) -> Route:
    """`/baton/explain`, for a front end's app."""

    async def why(request: Request) -> JSONResponse:
        return _answer(cluster, request)

    return Route("/baton/explain", why, methods=["GET"])


def placement_record(cluster: Cluster) -> dict[str, Any]:
    """Both pools as this front end's policy sees them now."""
    snapshot = cluster.fleet.snapshot()
    index = cluster.placement.cache.index
    return {
        "version": VERSION,
        "time": time.time(),
        "routing": asdict(cluster.placement.routing),
        "handoff_s": snapshot.handoff_s,
        "index": {"entries": len(index), "skipped": index.skipped} if index is not None else None,
        "workers": [_worker_record(worker) for worker in cluster.fleet.workers.values()],
    }


def _worker_record(worker: Worker) -> dict[str, Any]:
    facts, view = worker.link.facts, worker.account.view()
    return {
        "engine_id": facts.engine_id,
        "role": facts.role,
        "state": worker.state.value,
        "requests": view.requests,
        "tokens": view.tokens,
        "queued_tokens": view.queued_tokens,
        "queued_requests": view.queued_requests,
        "backlog_s": round(view.backlog_s, 4) if view.prefill else None,
        "streams": view.streams,
        "pulling_tokens": view.pulling_tokens,
        "free_blocks": view.free_blocks,
        "num_blocks": facts.num_blocks,
        "block_tokens": facts.block_tokens,
        "max_streams": facts.max_streams,
        "max_step_tokens": facts.max_step_tokens,
        "prefill": _cost(view.prefill),
        "step": _cost(view.step),
        "pull": _cost(view.pull),
    }


def _cost(cost: Cost | None) -> dict[str, float] | None:
    return None if cost is None else {"fixed_s": cost.fixed_s, "each_s": cost.each_s}


def _answer(cluster: Cluster, request: Request) -> JSONResponse:
    asked, placement = request.query_params, cluster.placement
    if request_id := asked.get("request"):
        decided = placement.find(request_id)
        if decided is None:
            return JSONResponse({"error": f"no decision on {request_id!r} is remembered here"}, 404)
        return JSONResponse(decided_record(decided, placement))
    try:
        cached = {engine: int(tokens) for engine, _, tokens in (c.rpartition(":") for c in asked.getlist("cached"))}
        view = RequestView(int(asked["tokens"]), cached=dict(sorted(cached.items(), key=lambda held: -held[1])))
    except (KeyError, ValueError):
        return JSONResponse({"error": "ask for request=ID, or tokens=N and perhaps cached=ENGINE:TOKENS"}, 400)
    return JSONResponse(explained(view, cluster.fleet.snapshot(), placement.routing))


def decided_record(decided: Decided, placement: Placement) -> dict[str, Any]:
    """A decision that was made, and why, from the snapshot that it was made from."""
    return {
        **explained(decided.view, decided.snapshot, placement.routing),
        "request": decided.request_id,
        "external_request": decided.external_id,
        "time": decided.at,
        "ttft_s": decided.first_token_s,
    }


def explained(view: RequestView, snapshot: Snapshot, routing: RoutingSettings) -> dict[str, Any]:
    """What the policy answers, and each candidate with its predicted figures."""
    answer, verdicts = explain(view, snapshot, routing)
    return {
        "prompt_tokens": view.prompt_tokens,
        "answer": {"refused": answer.reason} if isinstance(answer, Refused) else _plan_record(answer, snapshot),
        "meaning": REASONS[answer.reason],
        "candidates": [{**_plan_record(v.plan, snapshot, view.cached), "why": v.why} for v in verdicts],
    }


def _plan_record(plan: Plan, snapshot: Snapshot, cached: Mapping[str, int] | None = None) -> dict[str, Any]:
    prefill = plan.prefill if isinstance(plan, Disaggregated) else None
    record: dict[str, Any] = {"plan": type(plan).__name__.lower(), "prefill": prefill, "decode": plan.decode}
    record |= {"reason": plan.reason} if plan.reason else {}
    record |= asdict(plan.predicted) if plan.predicted else {}
    if cached is not None:
        views: dict[str, WorkerView] = {view.engine_id: view for view in (*snapshot.prefill, *snapshot.decode)}
        reader = views[prefill or plan.decode]
        record["cached_tokens"] = cached.get(reader.engine_id, 0)
        record["backlog_s"] = round(reader.backlog_s, 4)
        record["streams"] = views[plan.decode].streams
    return record
