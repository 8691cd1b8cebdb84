"""Where each half of a request runs: a pure function of the request and the snapshot.

Of the plans that keep the time between tokens within its limits, the one with the least predicted time to first token
wins (`predict.py` has the predictions). So a request follows its cache until the backlog there costs more than the hit
saves, a short prompt is read where it is decoded, and a pool that is behind is helped by an idle worker of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.policy.baselines import in_turn, least_loaded
from runtime.policy.decision import Candidate, Decision, rank
from runtime.policy.types import Plan, Refused, RequestView, RoutingSettings, Snapshot

LATENCY = RoutingSettings()

REASONS = {
    "no_workers": "refused: no worker can take work",
    "no_decode_workers": "there is only the prefill pool",
    "needs_prompt_logprobs": "the request can't be disaggregated",
    "no_prefill_workers": "there is only the decode pool",
    "always": "the settings say so, where it is possible",
    "never": "the settings say so",
    "least_loaded": "fewest requests: the settings say so, or the workers have told no figures yet",
    "round_robin": "the settings say so",
    "over_limits": "no plan keeps the limits; this one is quickest of those that are least over them",
    "follows_cache": "quickest: this worker holds more of the prompt than the least loaded one",
    "protects_streams": "quickest that holds up neither a decode worker's streams nor the prompts read there after it",
    "least_ttft": "quickest",
    "short_prompt": "quickest: what is not cached can be read on the decode worker within the limits",
    "decode_idle": "quickest: prefill is behind, and this decode worker has no streams to disturb",
    "decode_behind": "no decode worker keeps the limits, and this prefill worker is idle",
}
"""Why a plan was chosen: all labels there are, and what they mean."""


def route(
    request: RequestView, snapshot: Snapshot, settings: RoutingSettings = LATENCY, turn: int = 0
) -> Plan | Refused:
    """The plan for a request, with its reason and prediction; or why there is none.

    Args:
        turn: how many requests there were before; only round robin counts.
    """
    if not snapshot.decode and not snapshot.prefill:
        return Refused("no_workers")
    if settings.mode == "round_robin":
        return in_turn(request, snapshot, turn)
    if settings.mode == "least_loaded":
        return least_loaded(request, snapshot)
    return Decision(request, snapshot, settings).plan()


@dataclass(frozen=True)
class Verdict:
    """A candidate that was looked at, and why it won or lost."""

    plan: Plan
    why: str


def explain(
    request: RequestView, snapshot: Snapshot, settings: RoutingSettings = LATENCY
) -> tuple[Plan | Refused, list[Verdict]]:
    """The answer of `route`, and the candidates, best first. A worker is shown with the best one of the other pool."""
    answer = route(request, snapshot, settings)
    if isinstance(answer, Refused):
        return answer, []
    if settings.mode in ("round_robin", "least_loaded"):  # they look at no candidates
        return answer, [Verdict(answer, f"wins: {REASONS[answer.reason]}")]
    decision = Decision(request, snapshot, settings)
    winner = decision.winner
    verdicts = [Verdict(answer, f"wins: {REASONS[answer.reason]}")]
    rest = sorted((c for c in decision.all_candidates() if c != winner), key=rank)
    return answer, [*verdicts, *(Verdict(decision.as_plan(c, ""), _why_not(c, winner)) for c in rest)]


def _why_not(candidate: Candidate, winner: Candidate) -> str:
    if candidate.barred:
        return f"not considered: {candidate.barred}"
    if candidate.excess > winner.excess:
        shares = [candidate.writes, candidate.reads] if candidate.reads else [candidate.writes]
        full = [share.worker.engine_id for share in shares if share.no_room]
        return f"no room on {', '.join(full)}" if full else f"{candidate.excess:.0%} over the limits"
    if candidate.delays_s and candidate.ttft_s < winner.ttft_s + winner.delays_s:
        return f"would hold up prompts that come after it for {candidate.delays_s:.3f} s"
    return f"{max(0.0, candidate.ttft_s - winner.ttft_s):.3f} s slower"
