"""Costs learned from observations."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.costs import Cost, Line, WorkerCosts


def true(size: float) -> float:
    """10 ms and 1 ms for each unit."""
    return 0.010 + 0.001 * size


def learn(line: Line, law: Callable[[float], float], count: int, noise: float = 0.1, seed: int = 0) -> None:
    """Observe sizes from 1 to 2,000 with relative noise."""
    rng = random.Random(seed)
    for _ in range(count):
        size = 10 ** rng.uniform(0, 3.3)
        line.observe(size, law(size) * rng.uniform(1 - noise, 1 + noise))


def off(line: Line, law: Callable[[float], float]) -> float:
    """The largest relative error over the sizes that matter."""
    return max(abs(line.cost.of(size) / law(size) - 1) for size in (1, 10, 100, 1000, 2000))


def test_the_seed_is_believed_at_first() -> None:
    """Two self-measurements give the line through them; one gives a rate."""
    assert off(Line([(10, true(10)), (1000, true(1000))]), true) < 1e-6
    assert Line([(100, 0.5)]).cost == Cost(0.0, 0.005)


@pytest.mark.parametrize("seed", [[], [(0, 1.0)], [(10, 0.0)]])
def test_no_line_from_nothing(seed: list[tuple[float, float]]) -> None:
    """Without a measurement there is no estimate."""
    with pytest.raises(ValueError, match="a line starts from"):
        Line(seed)


def test_learns_through_noise() -> None:
    """From a wrong seed to within a tenth of the truth, at small and large sizes."""
    line = Line([(100, 1.0)])
    learn(line, true, 300)
    assert off(line, true) < 0.1


@pytest.mark.parametrize("factor", [0.01, 20.0, 1000.0])
def test_one_hiccup_hardly_moves_it(factor: float) -> None:
    """However far off it is."""
    line = Line([(10, true(10)), (1000, true(1000))])
    learn(line, true, 200, noise=0.05)
    line.observe(500, true(500) * factor)
    assert off(line, true) < 0.08


def test_one_in_twenty_outliers() -> None:
    """Steps that now and then take ten times as long (somebody else's work on the machine)."""
    rng = random.Random(1)
    line = Line([(10, true(10)), (1000, true(1000))])
    for _ in range(500):
        size = rng.uniform(1, 2000)
        line.observe(size, true(size) * (10 if rng.random() < 0.05 else rng.uniform(0.95, 1.05)))
    assert off(line, true) < 0.25


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_follows_a_lasting_change(factor: float) -> None:
    """A worker that became three times slower, or twice as fast, is known as such after some hundred observations."""
    line = Line([(10, true(10)), (1000, true(1000))])
    learn(line, true, 100)
    learn(line, lambda size: factor * true(size), 300, seed=1)
    assert off(line, lambda size: factor * true(size)) < 0.15


def test_work_of_one_size_only() -> None:
    """Where all prompts are equally long the shape of the line can't be seen: it is kept."""
    line = Line([(10, true(10)), (1000, true(1000))])
    for _ in range(1000):
        line.observe(1000, 2 * true(1000))
    assert line.cost.of(1000) == pytest.approx(2 * true(1000), rel=0.02)
    assert 0 <= line.cost.of(10) <= 2 * line.cost.of(1000)


@given(st.lists(st.tuples(st.floats(-10, 1e6), st.floats(-1, 1e4)), max_size=50))
def test_never_below_zero(observations: list[tuple[float, float]]) -> None:
    """Whatever is observed, work costs no negative time, and the estimate stays a number."""
    line = Line([(10, 0.1), (1000, 1.0)])
    for size, seconds in observations:
        line.observe(size, seconds)
    assert 0 <= line.cost.fixed_s < 1e9
    assert 0 <= line.cost.each_s < 1e9
    assert line.cost.of(100) > 0


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(1e-4, 10)), max_size=20))
def test_same_observations_same_estimate(observations: list[tuple[float, float]]) -> None:
    """There is no hidden state."""
    one, two = Line([(10, 0.1)]), Line([(10, 0.1)])
    for size, seconds in observations:
        one.observe(size, seconds)
        two.observe(size, seconds)
    assert one.cost == two.cost


def test_worker_separates_reading_from_decoding() -> None:
    """From steps of all kinds: prompts alone, streams alone, both in one."""
    rng = random.Random(0)
    costs = WorkerCosts()
    assert costs.prefill is costs.step is costs.pull is None
    for _ in range(400):
        streams, tokens = rng.choice([(0, 500), (8, 0), (1, 0), (32, 0), (8, 200), (16, 1000)])
        seconds = (0.02 + 0.001 * streams if streams else 0.0) + (0.005 + 0.002 * tokens if tokens else 0.0)
        costs.saw_step(seconds * rng.uniform(0.95, 1.05), tokens, streams)
    assert costs.step is not None and costs.prefill is not None
    assert costs.step.of(8) == pytest.approx(0.028, rel=0.1)
    assert costs.prefill.of(500) == pytest.approx(1.005, rel=0.1)


def test_worker_learns_its_pulls() -> None:
    """The first one is the seed."""
    costs = WorkerCosts()
    for number in range(300):
        tokens = 50 + 37 * number % 3000
        costs.saw_pull(0.004 + 1e-5 * tokens, tokens)
    assert costs.pull is not None
    assert costs.pull.of(0) == pytest.approx(0.004, rel=0.2)
    assert costs.pull.of(2000) == pytest.approx(0.024, rel=0.1)


def test_last_tokens_of_pulled_prompts_say_nothing_of_reading() -> None:
    """A decode worker computes one token of each pulled prompt: that must not change what it takes a prompt to cost."""
    costs = WorkerCosts()
    costs.seed(prompts=[(10, true(10)), (1000, true(1000))], steps=[(1, 0.02)])
    for _ in range(500):
        costs.saw_step(0.021, prompt_tokens=1, streams=4)
    assert costs.prefill is not None and costs.prefill.of(1000) == pytest.approx(true(1000))
