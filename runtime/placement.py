"""Where requests are put, and the evidence for it: the policy's answer, what it predicted, what came of it.

The last decisions are kept with the snapshot that each was made from, so that `baton explain` can tell afterwards why
a request went where it did.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from runtime.cache_view import CacheView
from runtime.metrics import PLANS, TTFT_OVER_PREDICTED
from runtime.policy.routing import route
from runtime.policy.types import Disaggregated, Plan, RequestView, RoutingSettings, Snapshot
from runtime.tracing import plan_span
from runtime.waiting_room import Look

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

logger = logging.getLogger("baton.placement")

KEPT = 512
"""So many of the last decisions can be explained."""

KEPT_HOLDERS = 64
"""So many of the workers that hold most of a prompt are kept with a decision."""


@dataclass(eq=False)
class Decided:
    """One decision. A request that goes on after a loss has another one, under the same ids."""

    request_id: str
    external_id: str  # the client's, or the id of the response
    at: float  # seconds since the epoch
    view: RequestView
    snapshot: Snapshot
    plan: Plan
    started: float  # as `at`, on the monotonic clock
    trace_headers: Mapping[str, str] | None = None  # the client's, if it sent any
    first_token_s: float | None = None  # measured, from the decision


class Placement:
    """Plans requests of one front end.

    Args:
        cache: who holds which blocks.
        traced: whether a span is made of each plan.
    """

    def __init__(self, routing: RoutingSettings, cache: CacheView, *, traced: bool = False) -> None:
        self.routing = routing
        self.cache = cache
        self._traced = traced
        self._turn = 0
        self._decided: OrderedDict[str, Decided] = OrderedDict()  # by internal request id, the newest last

    def look(self, request: EngineCoreRequest, keys: list[int], snapshot: Snapshot, *, whole: bool = False) -> Look:
        """What there is to know of a request now, and the plan that follows. Good until the next event of a cache.

        Args:
            keys: the names of the prompt's blocks (`CacheView.keys_of`).
            whole: one worker has to do all of it.
        """
        view = self._view(request, keys, whole)
        return Look(view, snapshot, route(view, snapshot, self.routing, self._turn))

    def chose(self, request: EngineCoreRequest, keys: list[int], look: Look, plan: Plan) -> None:
        """A request goes by this plan, which followed from this look a moment ago."""
        view, snapshot = look.view, look.snapshot
        self._turn += 1
        kept = RequestView(
            view.prompt_tokens, view.can_disaggregate, view.request_id, dict(islice(view.cached.items(), KEPT_HOLDERS))
        )
        engines = [plan.prefill, plan.decode] if isinstance(plan, Disaggregated) else [plan.decode]
        self.cache.predict(engines, keys, time.monotonic())
        self._keep(Decided(view.request_id, request.external_req_id or "", time.time(), kept, snapshot, plan,
                           time.monotonic(), request.trace_headers))  # fmt: skip
        PLANS.labels(plan=type(plan).__name__.lower(), reason=plan.reason).inc()

    def first_token(self, request_id: str) -> None:
        """A request's first token since its plan is here: tell what was predicted and what it took."""
        decided = self._decided.get(request_id)
        if decided is None or decided.first_token_s is not None:
            return
        decided.first_token_s = time.monotonic() - decided.started
        predicted = decided.plan.predicted
        if predicted is not None and predicted.measured and predicted.ttft_s > 0:
            TTFT_OVER_PREDICTED.observe(decided.first_token_s / predicted.ttft_s)
        logger.info("%s", line(decided))
        if self._traced:
            plan_span(decided.at, decided.first_token_s, decided.trace_headers, facts(decided))

    def find(self, request_id: str) -> Decided | None:
        """The newest decision on a request: by its internal id, the response's id or the client's `X-Request-Id`."""
        if found := self._decided.get(request_id):
            return found
        for decided in reversed(self._decided.values()):
            external = decided.external_id
            if request_id and (external.startswith(request_id) or external.partition("-")[2].startswith(request_id)):
                return decided
        return None

    def _view(self, request: EngineCoreRequest, keys: list[int], whole: bool) -> RequestView:
        params = request.sampling_params
        whole = whole or params is None or params.prompt_logprobs is not None or request.prompt_embeds is not None
        return RequestView(
            prompt_tokens=len(request.prompt_token_ids or ()),
            can_disaggregate=not whole,
            request_id=request.request_id,
            cached=self.cache.match(keys, time.monotonic()),
        )

    def _keep(self, decided: Decided) -> None:
        self._decided[decided.request_id] = decided
        self._decided.move_to_end(decided.request_id)
        if len(self._decided) > KEPT:
            self._decided.popitem(last=False)


def facts(decided: Decided) -> dict[str, str | int | float]:
    """A decision, what it predicted, and what came of it so far."""
    plan, predicted = decided.plan, decided.plan.predicted
    told: dict[str, str | int | float] = {
        "request": decided.request_id,
        "plan": type(plan).__name__.lower(),
        "reason": plan.reason,
        "prefill": plan.prefill if isinstance(plan, Disaggregated) else "-",
        "decode": plan.decode,
        "prompt_tokens": decided.view.prompt_tokens,
    }
    if predicted is not None:
        told |= {
            "uncached_tokens": predicted.uncached_tokens,
            "pulled_tokens": predicted.pulled_tokens,
            "predicted_ttft_s": predicted.ttft_s,
            "predicted_itl_s": predicted.itl_s,
            "predicted_gap_s": predicted.gap_s,
        }
    if decided.first_token_s is not None:
        told["ttft_s"] = decided.first_token_s
    return told


def line(decided: Decided) -> str:
    """A decision as one line of `name=value`."""
    told = facts(decided).items()
    return " ".join(f"{name}={value:.4f}" if isinstance(value, float) else f"{name}={value}" for name, value in told)
