"""Where each half of a request runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from runtime.policy.routing import REASONS, Verdict, explain, route
from runtime.policy.types import (
    PRESETS,
    Cost,
    Disaggregated,
    Local,
    Plan,
    Refused,
    RequestView,
    RoutingSettings,
    Snapshot,
    WorkerView,
)

# Without figures: what this front end sent decides.

P1, P2 = WorkerView("p1", 1, 100), WorkerView("p2", 5, 50)
D1, D2 = WorkerView("d1", 0, 0), WorkerView("d2", 1, 10)
PROMPT = RequestView(100)
WHOLE = RequestView(100, can_disaggregate=False)

UNMEASURED: list[tuple[str, RequestView, Snapshot, Plan | Refused]] = [
    ("fewest tokens wins", PROMPT, Snapshot((P1, P2), (D1, D2)), Disaggregated("p2", "d1", "least_loaded")),
    ("prompt logprobs run whole", WHOLE, Snapshot((P1,), (D1,)), Local("d1", "needs_prompt_logprobs")),
    ("no prefill worker", PROMPT, Snapshot((), (D2, D1)), Local("d1", "no_prefill_workers")),
    ("no decode worker", PROMPT, Snapshot((P1, P2), ()), Local("p2", "no_decode_workers")),
    ("nobody", PROMPT, Snapshot((), ()), Refused("no_workers")),
]


@pytest.mark.parametrize(
    ("request_view", "snapshot", "plan"), [c[1:] for c in UNMEASURED], ids=[c[0] for c in UNMEASURED]
)
def test_workers_without_figures(request_view: RequestView, snapshot: Snapshot, plan: Plan | Refused) -> None:
    """The least loaded ones, and what can be disaggregated is."""
    answer = route(request_view, snapshot)
    assert answer == plan
    assert isinstance(answer, Refused) or (answer.predicted and not answer.predicted.measured)


# With figures. A prompt token takes 1 ms, a step 20 ms and 1 ms for each stream, a pull 10 ms and 0.01 ms for each
# token: 100 tokens are read in 0.11 s, which fits into a gap of 0.2 s; 1,000 tokens take 1.01 s.


def prefill(name: str = "p1", **figures: Any) -> WorkerView:
    """An idle prefill worker, but for `figures`."""
    known = {"queued_tokens": 0, "prefill": Cost(0.01, 0.001), "step": Cost(0.02, 0.001), "pull": Cost(0.01, 1e-5)}
    return WorkerView(name, 0, 0, **{**known, "max_step_tokens": 2048, **figures})


def decode(name: str = "d1", **figures: Any) -> WorkerView:
    """A decode worker with four streams, but for `figures`."""
    return prefill(name, **{"streams": 4, **figures})


def request(tokens: int, **more: Any) -> RequestView:
    """A prompt of so many tokens."""
    return RequestView(tokens, **more)


SHORT, LONG = request(100), request(1000)
BUSY = {"queued_tokens": 3000, "queued_requests": 3}  # three seconds of prompts
STREAMS = {"streams": 100}  # 0.12 s between tokens: over the limit of 0.1 s

CASES: list[tuple[str, RequestView, Snapshot, Plan]] = [
    (
        "a short prompt is read where it is decoded",
        SHORT,
        Snapshot((prefill(),), (decode(),)),
        Local("d1", "short_prompt"),
    ),
    (
        "a long one would stall the streams there",
        LONG,
        Snapshot((prefill(),), (decode(),)),
        Disaggregated("p1", "d1", "protects_streams"),
    ),
    (
        "or those that may come while it is read",
        LONG,
        Snapshot((prefill(),), (decode(streams=0),)),
        Disaggregated("p1", "d1", "protects_streams"),
    ),
    (
        "short prompts add up: three hundred tokens wait already",
        SHORT,
        Snapshot((prefill(),), (decode(queued_tokens=300, queued_requests=3), decode("d2"))),
        Local("d2", "short_prompt"),
    ),
    (
        "and then prefill reads them",
        SHORT,
        Snapshot((prefill(),), (decode(queued_tokens=120, queued_requests=3),)),
        Disaggregated("p1", "d1", "least_ttft"),
    ),
    (
        "what is cached on the decode worker is not read",
        request(1000, cached={"d2": 960}),
        Snapshot((prefill(),), (decode(), decode("d2"))),
        Local("d2", "short_prompt"),
    ),
    (
        "small steps make small gaps, but a long prompt makes many of them",
        LONG,
        Snapshot((prefill(),), (decode(max_step_tokens=120),)),
        Disaggregated("p1", "d1", "least_ttft"),
    ),
    (
        "unless each keeps the time between tokens, and prefill has work",
        LONG,
        Snapshot((prefill(queued_tokens=3000, queued_requests=3),), (decode(max_step_tokens=64, streams=2),)),
        Local("d1", "short_prompt"),
    ),
    (
        "the prefill worker with less to read",
        LONG,
        Snapshot((prefill(**BUSY), prefill("p2", queued_tokens=500, queued_requests=9)), (decode(),)),
        Disaggregated("p2", "d1", "protects_streams"),
    ),
    (
        "fewer seconds of work, not fewer tokens",
        LONG,
        Snapshot(
            (prefill(queued_tokens=900), prefill("p2", queued_tokens=1500, prefill=Cost(0.01, 0.0002))), (decode(),)
        ),
        Disaggregated("p2", "d1", "least_ttft"),
    ),
    (
        "the cache, while the backlog there costs less than the hit saves",
        request(1000, cached={"p2": 800}),
        Snapshot((prefill(), prefill("p2", queued_tokens=700)), (decode(),)),
        Disaggregated("p2", "d1", "follows_cache"),
    ),
    (
        "and not when it costs more",
        request(1000, cached={"p2": 800}),
        Snapshot((prefill(), prefill("p2", queued_tokens=900)), (decode(),)),
        Disaggregated("p1", "d1", "protects_streams"),
    ),
    (
        "the decode worker that has most of the blocks, when fetching is slow",
        request(1000, cached={"d2": 700, "p1": 700}),
        Snapshot((prefill(),), (decode(pull=Cost(0.01, 1e-3)), decode("d2", pull=Cost(0.01, 1e-3), streams=20))),
        Disaggregated("p1", "d2", "protects_streams"),
    ),
    (
        "a decode worker that keeps the time between tokens",
        LONG,
        Snapshot((prefill(),), (decode(**STREAMS, pull=Cost(0, 0)), decode("d2", streams=60))),
        Disaggregated("p1", "d2", "protects_streams"),
    ),
    (
        "a decode worker with blocks left",
        LONG,
        Snapshot((prefill(),), (decode(free_blocks=60), decode("d2", streams=60, free_blocks=70))),
        Disaggregated("p1", "d2", "protects_streams"),
    ),
    (
        "a decode worker with a place left",
        LONG,
        Snapshot((prefill(),), (decode(max_streams=4), decode("d2", streams=60, max_streams=61))),
        Disaggregated("p1", "d2", "protects_streams"),
    ),
    (
        "a prefill worker with blocks left",
        LONG,
        Snapshot((prefill(free_blocks=10), prefill("p2", queued_tokens=100)), (decode(),)),
        Disaggregated("p2", "d1", "protects_streams"),
    ),
    (
        "an idle decode worker takes a long prompt when prefill is behind",
        LONG,
        Snapshot((prefill(**BUSY),), (decode(), decode("d2", streams=0))),
        Local("d2", "decode_idle"),
    ),
    (
        "but not one that is fetching blocks",
        LONG,
        Snapshot((prefill(**BUSY),), (decode(), decode("d2", streams=0, pulling_tokens=100))),
        Disaggregated("p1", "d2", "protects_streams"),
    ),
    (
        "an idle prefill worker takes the whole request when decode is behind",
        LONG,
        Snapshot((prefill(**BUSY), prefill("p2")), (decode(**STREAMS),)),
        Local("p2", "decode_behind"),
    ),
    (
        "but not one with prompts of its own",
        LONG,
        Snapshot((prefill(**BUSY),), (decode(**STREAMS),)),
        Disaggregated("p1", "d1", "over_limits"),
    ),
    (
        "a lent prefill worker is given back: prompts go where they stall nobody",
        LONG,
        Snapshot((prefill(streams=3), prefill("p2", queued_tokens=800)), (decode(),)),
        Disaggregated("p2", "d1", "protects_streams"),
    ),
    (
        "prompt logprobs go to an idle prefill worker too",
        request(100, can_disaggregate=False),
        Snapshot((prefill(),), (decode(**STREAMS),)),
        Local("p1", "decode_behind"),
    ),
    (
        "a prompt that is read at once is quickest through prefill when it costs nothing to hand over",
        SHORT,
        Snapshot((prefill(prefill=Cost(0, 1e-5)),), (decode(pull=Cost(0, 0)),)),
        Disaggregated("p1", "d1", "least_ttft"),
    ),
]


@pytest.mark.parametrize(("request_view", "snapshot", "plan"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_adaptive(request_view: RequestView, snapshot: Snapshot, plan: Plan) -> None:
    """The least time to first token among the plans that keep the limits."""
    assert route(request_view, snapshot) == plan


MODES: list[tuple[str, RequestView, Snapshot, Plan]] = [
    ("always-disaggregated", SHORT, Snapshot((prefill(),), (decode(),)), Disaggregated("p1", "d1", "always")),
    ("always-disaggregated", LONG, Snapshot((prefill(),), (decode(**STREAMS),)), Disaggregated("p1", "d1", "always")),
    ("always-disaggregated", LONG, Snapshot((), (decode(),)), Local("d1", "no_prefill_workers")),
    ("always-disaggregated", WHOLE, Snapshot((prefill(),), (decode(),)), Local("d1", "needs_prompt_logprobs")),
    ("never", LONG, Snapshot((prefill(),), (decode(),)), Local("p1", "never")),
    ("never", LONG, Snapshot((prefill(**BUSY),), (decode(**STREAMS),)), Local("d1", "never")),
    ("never", LONG, Snapshot((), (decode(),)), Local("d1", "never")),
    ("never", LONG, Snapshot((prefill(),), ()), Local("p1", "never")),
    ("latency", request(300), Snapshot((prefill(),), (decode(),)), Disaggregated("p1", "d1", "protects_streams")),
    ("throughput", request(300), Snapshot((prefill(),), (decode(),)), Local("d1", "short_prompt")),
]


@pytest.mark.parametrize(("preset", "request_view", "snapshot", "plan"), MODES)
def test_presets(preset: str, request_view: RequestView, snapshot: Snapshot, plan: Plan) -> None:
    """Each preset does what its name says."""
    assert route(request_view, snapshot, PRESETS[preset]) == plan


def test_no_borrowing_when_switched_off() -> None:
    """The pools keep to their own work."""
    own = RoutingSettings(borrow=False)
    assert isinstance(route(LONG, Snapshot((prefill(),), (decode(**STREAMS),)), own), Disaggregated)
    assert isinstance(route(LONG, Snapshot((prefill(**BUSY),), (decode(streams=0),)), own), Disaggregated)


def test_prediction_of_a_disaggregated_plan() -> None:
    """Backlog, reading, messages, fetching what is not there, and one step."""
    snapshot = Snapshot((prefill(queued_tokens=500, queued_requests=2),), (decode(),), handoff_s=0.003)
    plan = route(request(1000, cached={"p1": 200, "d1": 400}), snapshot)
    assert isinstance(plan, Disaggregated)
    assert plan.predicted
    assert plan.predicted.ttft_s == pytest.approx((0.52 + 0.81) + 0.003 + (0.01 + 600 * 1e-5) + 0.025)
    assert plan.predicted.itl_s == plan.predicted.gap_s == pytest.approx(0.025)
    assert (plan.predicted.uncached_tokens, plan.predicted.pulled_tokens, plan.predicted.measured) == (800, 600, True)


def test_prediction_of_a_local_plan() -> None:
    """Reading beside four streams: their gap is the step with the prompt in it."""
    plan = route(SHORT, Snapshot((prefill(),), (decode(),)))
    assert isinstance(plan, Local)
    assert plan.predicted
    assert plan.predicted.ttft_s == pytest.approx(0.11 + 0.024)
    assert plan.predicted.gap_s == pytest.approx(0.024 + 0.11)
    assert plan.predicted.itl_s == pytest.approx(0.025)
    assert (plan.predicted.uncached_tokens, plan.predicted.pulled_tokens) == (100, 0)


def test_each_step_of_a_prompt_has_its_fixed_part() -> None:
    """Read in small steps beside streams a long prompt takes longer than on an idle prefill worker."""
    small = decode(max_step_tokens=32, prefill=Cost(0.1, 0.0))
    settings = RoutingSettings(itl_limit_s=0.6, gap_limit_s=1.2)
    _, verdicts = explain(LONG, Snapshot((prefill(prefill=Cost(0.03, 0.003)),), (small,)), settings)
    assert isinstance(verdicts[0].plan, Disaggregated)
    local = next(v.plan for v in verdicts if isinstance(v.plan, Local) and v.plan.decode == "d1")
    assert local.predicted
    assert local.predicted.ttft_s == pytest.approx(32 * (0.1 + 0.024))
    behind = decode(max_step_tokens=32, prefill=Cost(0.1, 0.0), queued_tokens=320, queued_requests=1)
    assert behind.backlog_s == pytest.approx(10 * 0.1)


@pytest.mark.parametrize(
    ("tokens", "waiting", "plan"),
    [
        (60, 0, "local"),
        (60, 1200, "local"),
        (1200, 0, "disaggregated"),
        (1200, 1200, "disaggregated"),  # 7.3 s, where the decode worker would have read it in 3.9 s
        (1200, 4800, "local"),
    ],
)
def test_a_long_prompt_leaves_the_decode_worker_to_short_ones(tokens: int, waiting: int, plan: str) -> None:
    """As long as the prefill worker is not so far behind that this costs more than the short ones' wait."""
    settings = RoutingSettings(itl_limit_s=0.6, gap_limit_s=1.2)
    busy = prefill(prefill=Cost(0.03, 0.003), queued_tokens=waiting, queued_requests=waiting // 1200)
    small = decode(max_step_tokens=32, prefill=Cost(0.08, 0.0), streams=2)
    answer, verdicts = explain(request(tokens), Snapshot((busy,), (small,)), settings)
    assert isinstance(answer, Local if plan == "local" else Disaggregated)
    whys = [v.why for v in verdicts if isinstance(v.plan, Local) and v.plan.decode == "d1"]
    assert (waiting == 1200 and tokens == 1200) == any("would hold up prompts" in why for why in whys)


def test_a_prompt_that_is_cached_to_its_end_is_not_free() -> None:
    """The last token is always computed."""
    plan = route(request(1000, cached={"d1": 1000}), Snapshot((prefill(),), (decode(),)))
    assert isinstance(plan, Local)
    assert plan.predicted
    assert plan.predicted.uncached_tokens == 1


def test_equal_workers_share_requests() -> None:
    """By the request's id: the same request goes to the same worker, a burst goes everywhere."""
    snapshot = Snapshot(tuple(prefill(f"p{n}") for n in range(40)), tuple(decode(f"d{n}") for n in range(40)))
    plans = [route(request(1000, request_id=f"r{n}"), snapshot) for n in range(400)]
    assert plans == [route(request(1000, request_id=f"r{n}"), snapshot) for n in range(400)]
    for half in ("prefill", "decode"):
        uses = Counter(getattr(plan, half) for plan in plans)
        assert len(uses) == 40
        assert max(uses.values()) < 30


def test_holders_are_found_among_many() -> None:
    """A busy worker that holds the prompt is looked at although a thousand are less loaded."""
    pool = [prefill(f"p{n}", queued_tokens=n) for n in range(1000)]
    plan = route(request(2000, cached={"gone": 2000, "p700": 1900}), Snapshot(tuple(pool), (decode(),)))
    assert plan == Disaggregated("p700", "d1", "follows_cache")


def test_holders_of_no_more_than_the_least_loaded_are_not_looked_at() -> None:
    """A system prompt that all hold says nothing for any of them; but a quick worker is found among its holders."""
    pool = [prefill(f"p{n}", queued_tokens=n) for n in range(100)]
    shared = request(2000, cached={f"p{n}": 256 for n in reversed(range(100))})
    assert shown(explain(shared, Snapshot(tuple(pool), (decode(),)))[1]) == {"p0", "p1", "p2", "p3"}
    pool[90] = prefill("p90", queued_tokens=90, prefill=Cost(0.01, 0.0004))
    assert route(shared, Snapshot(tuple(pool), (decode(),))) == Disaggregated("p90", "d1", "least_ttft")


def test_a_local_plan_that_nothing_can_beat_is_shown_with_the_others() -> None:
    """The halves of a pair are not needed to choose it, and `explain` has them all the same."""
    snapshot = Snapshot((prefill(), prefill("p2")), (decode(), decode("d2")))
    answer, verdicts = explain(request(1000, cached={"d2": 960}), snapshot)
    assert answer == Local("d2", "short_prompt")
    pairs = {(v.plan.prefill, v.plan.decode) for v in verdicts if isinstance(v.plan, Disaggregated)}
    assert len(pairs) == 3, "the best of each pool, and each other worker with the best of the other pool"
    assert len(verdicts) == 3 + 4


def shown(verdicts: list[Verdict]) -> set[str]:
    """The prefill workers of the candidates."""
    return {v.plan.prefill for v in verdicts if isinstance(v.plan, Disaggregated)}


def test_looks_further_when_the_least_loaded_do_not_do() -> None:
    """The least loaded decode workers have no blocks left, one further on has."""
    pool = [decode(f"d{n}", streams=n, free_blocks=100 if n == 11 else 1) for n in range(30)]
    assert route(LONG, Snapshot((prefill(),), tuple(pool))) == Disaggregated("p1", "d11", "protects_streams")


def test_explain_shows_what_was_looked_at() -> None:
    """The winner first; every other one with its prediction and what was against it."""
    snapshot = Snapshot((prefill(), prefill("p2", queued_tokens=500)), (decode(), decode("d2", free_blocks=5)))
    answer, verdicts = explain(LONG, snapshot)
    assert verdicts[0].plan == answer == route(LONG, snapshot)
    assert verdicts[0].why == f"wins: {REASONS['protects_streams']}"
    why = {(getattr(v.plan, "prefill", None), v.plan.decode): v.why for v in verdicts}
    assert why["p2", "d1"] == "0.510 s slower"
    assert why["p1", "d2"] == "no room on d2"
    assert why[None, "d1"].endswith("over the limits")
    assert why[None, "p1"] == "not considered: the decode pool is not behind"
    assert why[None, "p2"] == "not considered: the prefill worker has prompts of its own"
    assert len(why) == len(verdicts) == 7
    assert all(verdict.plan.predicted for verdict in verdicts)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("snapshot", [c[2] for c in CASES + UNMEASURED], ids=[c[0] for c in CASES + UNMEASURED])
def test_explain_agrees_with_route(preset: str, snapshot: Snapshot) -> None:
    """In every situation."""
    for request_view in (SHORT, LONG, WHOLE):
        answer, verdicts = explain(request_view, snapshot, PRESETS[preset])
        assert answer == route(request_view, snapshot, PRESETS[preset])
        assert not verdicts if isinstance(answer, Refused) else verdicts[0].plan == answer


def users(plan: Plan | Refused) -> set[str]:
    """The workers of a plan."""
    if isinstance(plan, Disaggregated):
        return {plan.prefill, plan.decode}
    return {plan.decode} if isinstance(plan, Local) else set()


def test_a_worker_that_is_not_in_the_snapshot() -> None:
    """News of a stranger are a mistake of the caller."""
    with pytest.raises(KeyError):
        Snapshot((P1,), (D1,)).with_view(WorkerView("x", 0, 0))


def test_policies_to_compare_with() -> None:
    """Round robin takes turns in both pools; least loaded counts requests of all front ends, whatever their length."""
    busy = replace(P1, queued_tokens=10, queued_requests=3), replace(P2, queued_tokens=9000, queued_requests=1)
    snapshot = Snapshot(busy, (D1, D2))
    turns = [route(PROMPT, snapshot, PRESETS["round-robin"], turn) for turn in range(3)]
    assert [users(plan) for plan in turns] == [{"p1", "d1"}, {"p2", "d2"}, {"p1", "d1"}]
    least = route(PROMPT, snapshot, PRESETS["least-loaded"])
    assert isinstance(least, Disaggregated) and least.prefill == "p2"
    for mode in ("round-robin", "least-loaded"):
        whole = route(replace(PROMPT, can_disaggregate=False), snapshot, PRESETS[mode])
        assert isinstance(whole, Local) and whole.decode.startswith("d")
        assert isinstance(route(PROMPT, Snapshot((), ()), PRESETS[mode]), Refused)
        assert explain(PROMPT, snapshot, PRESETS[mode])[1][0].why.startswith("wins: ")
