"""What a worker tells of its load, and what a front end makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats, SchedulerIterationDetails, SchedulerStats

from kv_transfer.costs import Cost
from kv_transfer.engine import EngineFacts
from kv_transfer.handoff import KV_PARAMS, REMOTE_DECODE
from kv_transfer.load import COARSE_TOKENS, HIT_HALF_LIFE_S, Load, Meter, News
from runtime.account import Account, Charge, charges
from runtime.policy.types import Disaggregated, Local, Plan, Predicted

BLOCKS = 1000
FACTS = EngineFacts(
    "e", "decode", "/m", "bfloat16", "auto", 16, 1, 8192, BLOCKS, "127.0.0.1", 1, max_streams=64, max_step_tokens=2048
)
PULL = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_request_id": "r", "remote_block_ids": [[1]]}


def leg(name: str, tokens: int, kv: dict[str, Any] | None = None) -> EngineCoreRequest:
    """A leg as a front end sends it."""
    params = SamplingParams(max_tokens=8, extra_args={KV_PARAMS: dict(kv)} if kv else None)
    return EngineCoreRequest(name, [1] * tokens, None, params, None, 0.0, None, None, None)


def step(
    *outputs: EngineCoreOutput, read: int = 0, streams: int = 0, seconds: float = 0.01, usage: float = 0.0
) -> EngineCoreOutputs:
    """One engine step as vLLM tells it."""
    details = SchedulerIterationDetails(0, int(read > 0), read, streams, streams, seconds * 1000)
    stats = SchedulerStats(kv_cache_usage=usage, iteration_details=details)
    return EngineCoreOutputs(outputs=list(outputs), scheduler_stats=stats)


def first(name: str, computed: int, finished: bool = False) -> EngineCoreOutput:
    """A leg's first token."""
    stats = PrefillStats(num_prompt_tokens=computed, num_computed_tokens=computed)
    return EngineCoreOutput(name, [5], prefill_stats=stats, finish_reason=FinishReason.LENGTH if finished else None)


def test_a_prompt_is_queued_until_it_is_read() -> None:
    """In chunks: each step's tokens are taken off; with the first token it is a stream."""
    meter = Meter(BLOCKS)
    meter.took(leg("a", 3200), None, 0.0)
    meter.took(leg("b", 640), 320, 0.0)
    assert (meter.load(0.0).queued_tokens, meter.load(0.0).queued_requests, meter.load(0.0).streams) == (3520, 2, 2)
    meter.stepped(step(read=2048), 1.0)
    assert meter.load(1.0).queued_tokens == 3520 - 2048
    meter.stepped(step(first("a", 3200), read=1472), 2.0)
    assert (meter.load(2.0).queued_tokens, meter.load(2.0).queued_requests) == (0, 1)  # 320 of b were read beside a
    meter.stepped(step(first("b", 320), streams=1, usage=0.25), 3.0)
    assert meter.load(3.0).queued_requests == 0
    assert meter.load(3.0).free_blocks == 750
    meter.dropped("a")
    assert meter.load(3.0).streams == 1


def test_kv_is_needed_by_legs_and_by_hits() -> None:
    """Prompts that are here, and what the cache spared, which fades: a worker that spared nothing is missed least."""
    meter = Meter(BLOCKS)
    assert meter.needed_tokens(0.0) == 0
    meter.took(leg("a", 3200), 1600, 0.0)
    assert meter.needed_tokens(1.0) == 3200
    stats = PrefillStats()
    stats.set(3200, 1600, 0)
    meter.stepped(step(EngineCoreOutput("a", [5], prefill_stats=stats), read=1600), 10.0)
    assert meter.needed_tokens(10.0) == 3200 + 1600
    meter.dropped("a")
    assert meter.needed_tokens(10.0 + HIT_HALF_LIFE_S) == pytest.approx(800)
    meter.took(leg("b", 320), None, 400.0)
    meter.stepped(step(first("b", 320, finished=True), read=320), 410.0)
    assert meter.needed_tokens(410.0) < 800, "what had to be read was needed of nobody"


def test_a_prefill_leg_is_no_stream_and_a_pull_is_not_read() -> None:
    """What is fetched counts apart from what is read."""
    meter = Meter(BLOCKS)
    meter.took(leg("p", 320, REMOTE_DECODE), None, 0.0)
    assert (meter.load(0.0).queued_tokens, meter.load(0.0).streams) == (320, 0)
    meter.stepped(step(first("p", 320, finished=True), read=320), 1.0)
    assert meter.load(1.0).queued_requests == 0
    meter.took(leg("d", 320, PULL), 160, 2.0)
    load = meter.load(2.0)
    assert (load.pulling_tokens, load.queued_tokens, load.queued_requests, load.streams) == (160, 0, 0, 1)
    meter.stepped(step(first("d", 1), read=1), 2.5)
    assert meter.load(2.5).pulling_tokens == 0
    assert meter.load(2.5).pull is not None and meter.load(2.5).pull.of(160) == pytest.approx(0.5, rel=0.05)  # type: ignore[union-attr]


def test_costs_are_learned_from_steps() -> None:
    """Of prompts alone and of streams alone, rounded to a few percent."""
    meter = Meter(BLOCKS)
    for number in range(200):
        meter.stepped(step(read=100 + 10 * number, seconds=0.005 + (100 + 10 * number) * 1e-4), 0.0)
        meter.stepped(step(streams=1 + number % 50, seconds=0.01 + (1 + number % 50) * 1e-3), 0.0)
    load = meter.load(0.0)
    assert load.prefill is not None and load.prefill.of(1000) == pytest.approx(0.105, rel=0.06)
    assert load.step is not None and load.step.of(20) == pytest.approx(0.03, rel=0.06)


def test_a_long_step_counts_while_it_lasts() -> None:
    """What was read of it is told at its end; until then it is reckoned by the time that it has taken."""
    meter = Meter(BLOCKS, max_step_tokens=2048)
    meter.costs.seed([(1000, 1.0), (2000, 2.0)], [(1, 0.01)])
    meter.took(leg("a", 2048), None, 100.0)
    meter.took(leg("b", 1024), None, 100.5)
    assert meter.load(101.0).queued_tokens == pytest.approx(3072 - 1000, abs=COARSE_TOKENS)
    assert meter.load(130.0).queued_tokens == pytest.approx(3072 - 0.9 * 2048, abs=COARSE_TOKENS)
    meter.stepped(step(first("a", 2048), read=2048, seconds=2.0), 102.0)
    assert meter.load(102.0).queued_tokens == 1024
    meter.took(leg("p", 64, PULL), None, 103.0)
    for name in ("a", "b"):
        meter.dropped(name)
    meter.took(leg("c", 1000), None, 200.0)
    assert meter.load(200.0).queued_tokens == 1024, "a worker that only waited for blocks was in no step"


def test_about_the_same_is_no_news() -> None:
    """A load that has hardly changed is equal, so that nothing is sent."""
    meter = Meter(BLOCKS)
    meter.took(leg("a", 3200), None, 0.0)
    meter.stepped(step(read=1, usage=0.1001), 0.0)
    before = meter.load(0.0)
    meter.stepped(step(read=COARSE_TOKENS // 4, usage=0.1002), 0.0)
    assert meter.load(0.0) == before


def test_what_was_sent_is_added_until_the_worker_counts_it() -> None:
    """Neither forgotten nor counted twice, whether news comes before or after the leg arrived."""
    account = Account(FACTS)
    account.news(News(Load(queued_tokens=100, queued_requests=1, streams=3, free_blocks=500), legs=0))
    one, two = Charge(160, reads=160, writes=True), Charge(320, reads=320, writes=True)
    account.open(one)
    account.open(two)
    account.sent(one, 1)
    account.sent(two, 2)
    assert (account.view().queued_tokens, account.view().queued_requests, account.view().streams) == (580, 3, 5)
    assert account.view().free_blocks == 500 - 30
    account.news(News(Load(queued_tokens=260, queued_requests=2, streams=4, free_blocks=490), legs=1))
    assert (account.view().queued_tokens, account.view().streams, account.view().free_blocks) == (580, 5, 470)
    account.begun(one)
    assert account.view().queued_tokens == 420
    account.close(one)
    account.close(two)
    assert (account.view().queued_tokens, account.view().queued_requests, account.view().streams) == (100, 1, 3)
    assert account.requests == account.tokens == 0


def test_blocks_are_on_their_way_once_the_leg_is_sent() -> None:
    """Until its prefill has ended, a decode leg only takes a place."""
    account = Account(FACTS)
    account.news(News(Load(), legs=0))
    charge = Charge(100, pulls=96, writes=True)
    account.open(charge)
    assert (account.view().streams, account.view().pulling_tokens) == (1, 0)
    account.sent(charge, 1)
    assert account.view().pulling_tokens == 96
    account.begun(charge)
    assert (account.view().streams, account.view().pulling_tokens) == (1, 0)


def test_without_news_a_front_end_goes_by_what_it_sent() -> None:
    """Nothing is made up for a worker that has said nothing."""
    account = Account(FACTS)
    account.open(Charge(100, reads=100))
    view = account.view()
    assert (view.requests, view.tokens, view.queued_tokens, view.prefill) == (1, 100, None, None)


def test_the_worker_s_figures_reach_the_policy() -> None:
    """Costs and limits, each in its place."""
    account = Account(FACTS)
    account.news(News(Load(prefill=Cost(1, 2), step=Cost(3, 4), pull=Cost(5, 6), pulling_tokens=64), legs=0))
    view = account.view()
    assert (view.prefill.of(1), view.step.of(1), view.pull.of(1)) == (3, 7, 11)  # type: ignore[union-attr]
    assert (view.max_streams, view.max_step_tokens, view.block_tokens, view.pulling_tokens) == (64, 2048, 16, 64)


@pytest.mark.parametrize(
    ("plan", "decode", "prefill"),
    [
        (Local("d", "r", Predicted(0, 0, 0, 40, 0, True)), (40, 0), None),
        (Disaggregated("p", "d", "r", Predicted(0, 0, 0, 40, 70, True)), (0, 70), 40),
        (Disaggregated("p", "d", "warm-up"), (0, 100), 100),
    ],
)
def test_a_plan_s_charges(plan: Plan, decode: tuple[int, int], prefill: int | None) -> None:
    """What is read or fetched where, as the plan predicts it; all of the prompt when it predicts nothing."""
    writes, reads = charges(plan, 100, 8)
    assert (writes.reads, writes.pulls, writes.tokens, writes.writes) == (*decode, 108, True)
    assert (reads.reads if reads else None) == prefill
