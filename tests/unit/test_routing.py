"""Where each half of a request runs."""

from __future__ import annotations

import pytest

from runtime.policy.routing import route
from runtime.policy.types import Disaggregated, Local, Plan, Refused, RequestView, Snapshot, WorkerView

P1, P2 = WorkerView("p1", 1, 100), WorkerView("p2", 5, 50)
D1, D2 = WorkerView("d1", 0, 0), WorkerView("d2", 1, 10)
PROMPT = RequestView(100)
WHOLE = RequestView(100, can_disaggregate=False)

CASES: list[tuple[str, RequestView, Snapshot, Plan | Refused]] = [
    ("fewest tokens wins", PROMPT, Snapshot((P1, P2), (D1, D2)), Disaggregated("p2", "d1")),
    ("prompt logprobs run whole", WHOLE, Snapshot((P1,), (D1,)), Local("d1", "needs_prompt_logprobs")),
    ("no prefill worker", PROMPT, Snapshot((), (D2, D1)), Local("d1", "no_prefill_workers")),
    ("no decode worker", PROMPT, Snapshot((P1, P2), ()), Local("p2", "no_decode_workers")),
    ("nobody", PROMPT, Snapshot((), ()), Refused("no_workers")),
]


@pytest.mark.parametrize(("request_view", "snapshot", "plan"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_route(request_view: RequestView, snapshot: Snapshot, plan: Plan | Refused) -> None:
    """The plan for each situation."""
    assert route(request_view, snapshot) == plan
