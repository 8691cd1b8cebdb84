"""How many workers, whatever comes: properties of single decisions, and of hours of them in a simulated plant."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.policy.demand import DemandSettings, PoolLoad, places_of
from runtime.policy.objectives import Objectives
from runtime.policy.scaling import scale
from runtime.policy.scaling_records import FleetLoad, Memory, PoolBounds, PoolMemory, ScalingSettings
from runtime.policy.types import Cost

READ = Cost(0.0, 1e-4)
STEP = Cost(0.01, 0.001)
TICK_S = 2.0

workers = st.integers(0, 12)
rates = st.floats(0, 1e6)
seconds = st.floats(0, 10)


@st.composite
def pools(draw: st.DrawFn) -> PoolLoad:
    """Any load, measured or not."""
    measured = draw(st.booleans())
    kv_use = draw(st.floats(0, 1))
    return PoolLoad(
        ready=draw(workers),
        starting=draw(workers),
        draining=draw(st.integers(0, 3)),
        queued_requests=draw(st.integers(0, 500)),
        queued_tokens=draw(st.integers(0, 10**6)),
        arriving_tokens_s=draw(rates),
        lent_tokens_s=draw(rates),
        tokens_s=draw(st.floats(0, 1e5)),
        streams=draw(st.integers(0, 2000)),
        kv_use=kv_use,
        pinned_kv=draw(st.floats(0, kv_use)),
        read=READ if measured else None,
        step=STEP if measured else None,
        max_streams=draw(st.sampled_from([None, 64, 256])),
    )


@st.composite
def bounds(draw: st.DrawFn) -> PoolBounds:
    least = draw(st.integers(0, 3))
    return PoolBounds(least, draw(st.integers(max(1, least), 12)), gpus=draw(st.integers(1, 2)))


@st.composite
def choices(draw: st.DrawFn) -> ScalingSettings:
    prefill, decode = draw(bounds()), draw(bounds())
    floor = max(1, prefill.least) * prefill.gpus + max(1, decode.least) * decode.gpus
    return ScalingSettings(
        prefill,
        decode,
        DemandSettings(draw(st.sampled_from(["work", "queue_depth"]))),
        budget_gpus=draw(st.none() | st.integers(floor, 30)),
        ratio=draw(st.none() | st.just((0.5, 2.0))),
    )


def fleets(at_s: float) -> st.SearchStrategy[FleetLoad]:
    latency = st.none() | seconds
    return st.builds(FleetLoad, st.just(at_s), pools(), pools(), st.integers(0, 50), latency, latency)


def remembered(load: FleetLoad, chosen: ScalingSettings) -> Memory:
    """A memory within the bounds from long ago."""
    pools = ((load.prefill, chosen.prefill), (load.decode, chosen.decode))
    return Memory(*(PoolMemory(min(max(pool.workers, bound.least), bound.most), 120.0, 0.0) for pool, bound in pools))


@settings(max_examples=50)
@given(fleets(10_000.0), choices())
def test_bounded(load: FleetLoad, chosen: ScalingSettings) -> None:
    """Within the bounds of each pool and the budget of both, from any load."""
    before = remembered(load, chosen)
    answer, after = scale(load, chosen, before)
    assert chosen.prefill.least <= answer.prefill.workers <= chosen.prefill.most
    assert chosen.decode.least <= answer.decode.workers <= chosen.decode.most
    gpus = answer.prefill.workers * chosen.prefill.gpus + answer.decode.workers * chosen.decode.gpus
    draining = load.prefill.draining or load.decode.draining
    assert chosen.budget_gpus is None or draining or gpus <= chosen.budget_gpus
    assert (after.prefill.workers, after.decode.workers) == (answer.prefill.workers, answer.decode.workers)


@settings(max_examples=50)
@given(fleets(10_000.0), choices(), st.sampled_from(["prefill", "decode"]), st.data())
def test_monotone_in_load(load: FleetLoad, chosen: ScalingSettings, role: str, data: st.DataObject) -> None:
    """More of any kind of a pool's load never gives that pool fewer workers."""
    pool: PoolLoad = getattr(load, role)
    heavier = replace(
        pool,
        queued_requests=pool.queued_requests + data.draw(st.integers(0, 100)),
        queued_tokens=pool.queued_tokens + data.draw(st.integers(0, 10**5)),
        arriving_tokens_s=pool.arriving_tokens_s + data.draw(rates),
        tokens_s=pool.tokens_s + data.draw(rates),
        streams=pool.streams + data.draw(st.integers(0, 500)),
        kv_use=data.draw(st.floats(pool.kv_use, 1)),
    )
    before = remembered(load, chosen)
    light = scale(load, chosen, before)[0]
    heavy = scale(replace(load, **{role: heavier}), chosen, before)[0]
    assert getattr(heavy, role).workers >= getattr(light, role).workers


@settings(max_examples=50)
@given(fleets(10_000.0), choices())
def test_never_below_what_drains(load: FleetLoad, chosen: ScalingSettings) -> None:
    """While workers drain, their pool does not shrink further."""
    before = remembered(load, chosen)
    answer = scale(load, chosen, before)[0]
    for role in ("prefill", "decode"):
        pool = getattr(load, role)
        if pool.draining:
            held = min(pool.workers, getattr(before, role).workers)
            assert getattr(answer, role).workers >= held


@settings(max_examples=50)
@given(fleets(10_000.0), choices(), st.data())
def test_the_right_pool_for_the_right_cause(load: FleetLoad, chosen: ScalingSettings, data: st.DataObject) -> None:
    """What waits for one pool never grows the other, unless a ratio ties them, or it takes back the help it lent."""
    chosen = replace(chosen, ratio=None, budget_gpus=None, borrow_s=0.0)
    before = remembered(load, chosen)
    base = scale(load, chosen, before)[0]
    more = data.draw(st.integers(1, 10**6))
    prompts = replace(load.prefill, queued_tokens=load.prefill.queued_tokens + more, queued_requests=500)
    assert scale(replace(load, prefill=prompts), chosen, before)[0].decode.workers <= base.decode.workers
    streams = replace(load.decode, streams=load.decode.streams + more, tokens_s=load.decode.tokens_s + more)
    assert scale(replace(load, decode=streams), chosen, before)[0].prefill.workers <= max(
        base.prefill.workers, before.prefill.workers
    )


@dataclass
class Plant:
    """Two pools that work as their costs say, with workers that take their time to start and to leave."""

    chosen: ScalingSettings
    start_s: float
    memory: Memory | None = None
    ready: dict[str, int] = field(default_factory=lambda: {"prefill": 1, "decode": 1})
    coming: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    queued_tokens: float = 0.0
    unwritten: float = 0.0
    history: list[tuple[int, int]] = field(default_factory=list)
    written: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    now_s: float = 0.0

    def tick(self, prompt_tokens_s: float, answer_tokens_s: float, answer_tokens: float = 200.0) -> None:
        """`TICK_S` of offered load, then a decision."""
        self.now_s += TICK_S
        for role, starts in self.coming.items():
            self.ready[role] += sum(at <= self.now_s for at in starts)
            self.coming[role] = [at for at in starts if at > self.now_s]
        work = self.queued_tokens + prompt_tokens_s * TICK_S
        self.queued_tokens = max(0.0, work - self.ready["prefill"] / READ.each_s * TICK_S)
        self.unwritten += answer_tokens_s * TICK_S
        streams = self.unwritten / answer_tokens
        running = min(streams, 256.0 * self.ready["decode"])
        step_s = STEP.of(running / self.ready["decode"]) if self.ready["decode"] else 1e9
        written = min(self.unwritten, running / step_s * TICK_S)
        self.unwritten -= written
        self.written.append(written / TICK_S)
        self._follow(prompt_tokens_s, int(running), int(streams - running), step_s)

    def _follow(self, prompt_tokens_s: float, running: int, waiting: int, step_s: float) -> None:
        prefill = PoolLoad(
            self.ready["prefill"],
            len(self.coming["prefill"]),
            queued_requests=int(self.queued_tokens / 1000),
            queued_tokens=int(self.queued_tokens),
            arriving_tokens_s=prompt_tokens_s,
            read=READ,
        )
        decode = PoolLoad(
            self.ready["decode"],
            len(self.coming["decode"]),
            queued_requests=waiting,
            tokens_s=sum(self.written) / len(self.written),
            streams=running,
            kv_use=min(1.0, running * 1000 / 128_000 / max(1, self.ready["decode"])),
            read=READ,
            step=STEP,
            max_streams=256,
        )
        load = FleetLoad(self.now_s, prefill, decode, ttft_s=prefill.backlog_s + 0.1, itl_s=step_s)
        answer, self.memory = scale(load, self.chosen, self.memory)
        for role, wanted in (("prefill", answer.prefill.workers), ("decode", answer.decode.workers)):
            there = self.ready[role] + len(self.coming[role])
            self.coming[role] += [self.now_s + self.start_s] * max(0, wanted - there)
            if wanted < there:
                self.coming[role] = self.coming[role][: max(0, wanted - self.ready[role])]
                self.ready[role] = min(self.ready[role], wanted)
        self.history.append((answer.prefill.workers, answer.decode.workers))


WIDE = ScalingSettings(PoolBounds(1, 50), PoolBounds(1, 50))


def changes(counts: list[tuple[int, int]]) -> int:
    """How often either number changed."""
    return sum(before != after for before, after in pairwise(counts))


@settings(deadline=None, max_examples=15)
@given(st.floats(100, 300_000), st.floats(10, 20_000), st.floats(0, 120), st.booleans())
def test_constant_load_is_answered_once(prompts: float, answers: float, start_s: float, tight: bool) -> None:
    """No flapping over a simulated hour: after a quarter of an hour hardly anything changes, and it is enough."""
    chosen = replace(WIDE, demand=DemandSettings(objectives=Objectives(0.5, 0.03))) if tight else WIDE
    plant = Plant(chosen, start_s)
    for _ in range(int(4500 / TICK_S)):
        plant.tick(prompts, answers)
    hour = plant.history[-int(3600 / TICK_S) :]
    assert changes(hour) <= 6
    assert changes(hour[-len(hour) // 2 :]) <= 2
    assert plant.queued_tokens * READ.each_s < 1.0 * plant.ready["prefill"]
    assert len(plant.written) == 15
    assert abs(sum(plant.written) / 15 - answers) < 0.02 * answers + 1


@settings(deadline=None, max_examples=5)
@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_a_step_up_and_down(prompt_scale: float, answer_scale: float) -> None:
    """Ten times the load is answered within a minute and a half of start time; afterwards both pools come back."""
    plant = Plant(WIDE, start_s=30.0)
    light = (5_000 * prompt_scale, 300 * answer_scale)
    for _ in range(300):
        plant.tick(*light)
    small = plant.history[-1]
    for _ in range(45):
        plant.tick(10 * light[0], 10 * light[1])
    assert plant.ready["prefill"] / READ.each_s > 10 * light[0]
    places = places_of(PoolLoad(step=STEP, max_streams=256), WIDE.demand.objectives)
    assert places is not None
    for _ in range(300):
        plant.tick(10 * light[0], 10 * light[1])
    assert plant.ready["decode"] * places / STEP.of(places) > 10 * light[1]
    for _ in range(3600):
        plant.tick(*light)
    assert all(now <= before + 1 for now, before in zip(plant.history[-1], small, strict=True))
    # Once up and once down, in single steps: never down and up again by turns.
    assert changes(plant.history) < 40
