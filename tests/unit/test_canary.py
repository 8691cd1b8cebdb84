"""The canary's judge: how often it is wrong, what it sees, what it says, and what it reads."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import httpx
import numpy as np
import pytest

from kserve_adapter.canary.command import NO_EVIDENCE, watch
from kserve_adapter.canary.judge import Evidence, Histogram, Judgement, JudgeSettings, NoEvidence, Verdict, judge
from kserve_adapter.canary.prometheus import Prometheus
from kserve_adapter.canary.sequential import mean, proportion

BOUNDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, math.inf)


@pytest.mark.parametrize("p", [0.0, 0.005, 0.1])
def test_a_proportions_bounds_hold_at_every_look(p: float) -> None:
    """In at most 5 % of streams is the truth ever outside, over 40 looks each; a 95 % interval at each look fails."""
    chance = np.random.default_rng(1)
    wrong = naive = 0
    for _ in range(300):
        hits = trials = 0
        out = naive_out = False
        for _ in range(40):
            hits += int(chance.binomial(50, p))
            trials += 50
            bounds = proportion(hits, trials, 0.05)
            out = out or not bounds.low <= p <= bounds.high
            width = 1.96 * math.sqrt(max(hits, 1) * (trials - hits)) / trials**1.5
            naive_out = naive_out or abs(hits / trials - p) > width
        wrong, naive = wrong + out, naive + naive_out
    assert wrong <= 0.05 * 300
    if p == 0.1:
        assert naive > 0.15 * 300


def test_a_means_bounds_hold_at_every_look() -> None:
    """In at most 5 % of streams, with a look at each of 200 values."""
    chance = random.Random(2)
    wrong = 0
    for _ in range(200):
        values: tuple[float, ...] = ()
        for _ in range(200):
            values = (*values, chance.gauss(0.3, 2.0))
            bounds = mean(values, 0.05)
            if not bounds.low <= 0.3 <= bounds.high:
                wrong += 1
                break
    assert wrong <= 0.05 * 200


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (0, 100), (100, 100), (1, 100), (3.5, 70.2), (120, 100)])
def test_bounds_are_bounds(hits: float, trials: float) -> None:
    """Ordered, within 0 and 1, around what was seen; tighter with more evidence; also at the ends."""
    bounds = proportion(hits, trials, 0.05)
    assert 0 <= bounds.low <= (min(hits, trials) / trials if trials else 0.5) <= bounds.high <= 1
    more = proportion(10 * hits, 10 * trials, 0.05)
    assert more.high - more.low <= bounds.high - bounds.low


def shares(median: float, sigma: float) -> list[float]:
    """The probability of each bucket under a log-normal latency."""
    upto = [0.5 * (1 + math.erf(math.log(bound / median) / (sigma * math.sqrt(2)))) for bound in BOUNDS[:-1]] + [1.0]
    return [here - before for here, before in zip(upto, [0.0, *upto], strict=False)]


class Live:
    """A revision under traffic: log-normal latencies, errors, a speed."""

    def __init__(self, seed: int, *, error: float = 0.001, ttft: float = 0.2, itl: float = 0.02, speed: float = 40.0):
        self._chance = np.random.default_rng(seed)
        self._error, self._speed = error, speed
        self._shares = {"ttft": shares(ttft, 0.5), "itl": shares(itl, 0.3)}
        self._counts = {name: np.zeros(len(BOUNDS)) for name in self._shares}
        self._requests = self._errors = 0
        self._speeds: list[float] = []

    def minutes(self, minutes: int, requests: int) -> None:
        """Serve for some minutes, in each so many requests."""
        count = minutes * requests
        self._requests += count
        self._errors += int(self._chance.binomial(count, self._error))
        self._counts["ttft"] += self._chance.multinomial(count, self._shares["ttft"])
        # All 50 gaps of a request are the same: as dependent as can be.
        self._counts["itl"] += 50 * self._chance.multinomial(count, self._shares["itl"])
        self._speeds += list(self._speed * self._chance.lognormal(0, 0.1, minutes))

    def evidence(self) -> Evidence:
        """What Prometheus would say."""
        ttft, itl = (Histogram(BOUNDS, tuple(self._counts[name].tolist())) for name in ("ttft", "itl"))
        return Evidence(self._requests, self._errors, ttft, itl, tuple(self._speeds))


def verdicts(seed: int, hours: int = 24, **canary: float) -> Iterator[Judgement]:
    """A look each hour; the canary gets a tenth of 100 requests a minute."""
    old, new = Live(2 * seed), Live(2 * seed + 1, **canary)
    for hour in range(1, hours + 1):
        old.minutes(60, 90)
        new.minutes(60, 10)
        yield judge(old.evidence(), new.evidence(), 60.0 * hour, JudgeSettings())


def outcome(seed: int, **canary: float) -> Verdict:
    """How a day's watch ends."""
    last = Verdict.HOLD
    for judgement in verdicts(seed, **canary):
        last = judgement.verdict
        if last is not Verdict.HOLD:
            break
    return last


def test_a_good_canary_is_promoted() -> None:
    """Of 40 canaries that are like stable at most 5 % are rolled back, and 90 % are promoted within a day."""
    ends = [outcome(seed) for seed in range(40)]
    assert ends.count(Verdict.ROLLBACK) <= 0.05 * len(ends)
    assert ends.count(Verdict.PROMOTE) >= 0.9 * len(ends)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"error": 0.05}, "errors"),
        ({"ttft": 0.5}, "p99 TTFT"),
        ({"itl": 0.06}, "p99 ITL"),
        ({"speed": 28.0}, "throughput"),
    ],
)
def test_a_bad_canary_is_rolled_back(bad: dict[str, float], named: str) -> None:
    """Each kind of fault is found within a day in 20 of 20, none is promoted, and the reason names it."""
    for seed in range(20):
        *_, last = iter_until_decided(seed, bad)
        assert last.verdict is Verdict.ROLLBACK
        assert any(reason.startswith(named) for reason in last.reasons)


def iter_until_decided(seed: int, canary: dict[str, float]) -> Iterator[Judgement]:
    """Looks up to the first that decides."""
    for judgement in verdicts(seed, **canary):
        yield judgement
        if judgement.verdict is not Verdict.HOLD:
            return


MIXED = [0.95 * fast + 0.05 * late for fast, late in zip(shares(0.05, 0.4), shares(2.0, 0.5), strict=True)]
"""One request in twenty is late: p99 is among the late ones."""


def looks(
    seed: int, percent: int, late: list[float], count: int = 60, usual: list[float] = MIXED
) -> Iterator[Judgement]:
    """So many looks, one after each 40 requests, of which the canary gets a share; they differ in their TTFT alone."""
    chance = np.random.default_rng(seed)
    seen = {"stable": np.zeros(len(BOUNDS)), "canary": np.zeros(len(BOUNDS))}
    for _ in range(count):
        to_canary = int(chance.binomial(40, percent / 100))
        seen["stable"] += chance.multinomial(40 - to_canary, usual)
        seen["canary"] += chance.multinomial(to_canary, late)
        stable, canary = (
            Evidence(counts.sum(), 0, Histogram(BOUNDS, tuple(counts.tolist())), EMPTY, ()) for counts in seen.values()
        )
        yield judge(stable, canary, 600, JudgeSettings())


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_a_good_canary_is_rarely_rolled_back_whoever_has_the_traffic(percent: int) -> None:
    """Of 60 watches of 60 looks at most 5 % end so where both are alike, also while little is known of stable."""
    wrong = sum(any(look.verdict is Verdict.ROLLBACK for look in looks(seed, percent, MIXED)) for seed in range(60))
    assert wrong <= 0.05 * 60


@pytest.mark.parametrize("percent", [10, 40, 90])
def test_a_late_canary_is_rolled_back_whoever_has_the_traffic(percent: int) -> None:
    """Ten times as late: found within 9,000 requests in 10 of 10, none is promoted before."""
    for seed in range(10):
        told = (look.verdict for look in looks(seed, percent, shares(6.0, 0.5), count=225))
        assert next((verdict for verdict in told if verdict is not Verdict.HOLD), None) is Verdict.ROLLBACK


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_one_beyond_the_margin_is_rarely_shown_to_be_within(percent: int) -> None:
    """Eight of a thousand are late on stable, so its p99 is not; twenty on the canary. Wrong in at most 5 % of 60."""
    usual, late = (
        [1 - share if bound == 0.1 else share * (bound == 5.0) for bound in BOUNDS] for share in (0.008, 0.02)
    )
    shown = [[look.findings[1].verdict for look in looks(seed, percent, late, usual=usual)] for seed in range(60)]
    assert sum(Verdict.PROMOTE in verdicts for verdicts in shown) <= 0.05 * 60


def test_stable_has_to_be_known_too() -> None:
    """A thousand late requests of a canary are nothing beyond a p99 that is still anywhere."""
    late = Histogram((0.1, 0.5, 1.0, math.inf), (0, 0, 1000, 0))
    for known, verdict in ((300, Verdict.HOLD), (1000, Verdict.ROLLBACK)):
        stable = some(ttft=replace(late, counts=(known, 0, 0, 0)))
        judgement = judge(stable, some(ttft=late), 90, JudgeSettings())
        assert judgement.verdict is verdict, judgement.reasons


def test_beyond_the_histogram_nothing_is_shown() -> None:
    """Where stable's p99 is over the last finite bucket, no canary is promoted for being within it."""
    beyond = Histogram((0.1, 1.0, math.inf), (0, 900, 100))
    judgement = judge(some(ttft=beyond), some(ttft=beyond), 90, JudgeSettings())
    assert judgement.verdict is Verdict.HOLD and judgement.reasons[0].startswith("p99 TTFT")


def test_one_at_the_margin_is_rarely_promoted() -> None:
    """As bad as it may just not be (2 % more errors, 1 % being allowed): promoted in at most 5 % of 40 days."""
    ends = [outcome(seed, error=0.0215) for seed in range(40)]
    assert ends.count(Verdict.PROMOTE) <= 0.05 * len(ends)


def some(**changes: Any) -> Evidence:
    """Evidence of a good hour with much traffic."""
    live = Live(3)
    live.minutes(90, 200)
    return replace(live.evidence(), **changes)


EMPTY = Histogram((), ())


def test_too_little_evidence_is_held() -> None:
    """Nothing at all, a few requests, and a short time: hold, with the reason."""
    nothing = Evidence(0, 0, EMPTY, EMPTY, ())
    few = replace(nothing, requests=20)
    for canary in (nothing, few):
        judgement = judge(some(speeds=()), canary, 600, JudgeSettings())
        assert judgement.verdict is Verdict.HOLD and "at least 500 are wanted" in judgement.reasons[0]
    good = some()
    short = judge(good, good, 10, JudgeSettings())
    assert short.verdict is Verdict.HOLD and "10 minutes" in short.reasons[0]
    assert judge(good, good, 90, JudgeSettings()).verdict is Verdict.PROMOTE


def test_an_obvious_failure_is_not_waited_for() -> None:
    """Every request fails: rolled back although there are few."""
    canary = Evidence(40, 40, EMPTY, EMPTY, ())
    assert judge(some(speeds=()), canary, 2, JudgeSettings()).verdict is Verdict.ROLLBACK


def test_a_watch_ends_when_it_is_decided_or_over() -> None:
    """Held until the end, ended by a decision, and not by a Prometheus that is away for a while."""
    now = [0.0]

    def run(answers: list[Any]) -> int:
        looks = iter(answers)

        def look(minutes: float) -> Judgement:
            answer = next(looks)
            if isinstance(answer, Exception):
                raise answer
            return Judgement(answer, (), ())

        now[0] = 0.0
        return watch(look, 3, 60, lambda: now[0], lambda s: now.__setitem__(0, now[0] + s))

    hold, gone = Verdict.HOLD, NoEvidence("away")
    assert run([hold] * 4) == 10
    assert run([hold, gone, Verdict.PROMOTE]) == 0
    assert run([hold, Verdict.ROLLBACK]) == 20
    assert run([gone] * 4) == NO_EVIDENCE


def prometheus(answers: dict[str, Any], asked: list[str]) -> Prometheus:
    """A server that answers by what a query contains."""

    def handle(request: httpx.Request) -> httpx.Response:
        form = parse_qs(request.content.decode())
        query = form["query"][0]
        asked.append(query)
        for part, result in answers.items():
            if part in query:
                made = result(form) if callable(result) else result
                return httpx.Response(200, json={"status": "success", "data": {"result": made}})
        return httpx.Response(200, json={"status": "success", "data": {"result": []}})

    return Prometheus("http://prometheus", httpx.MockTransport(handle))


def test_evidence_from_prometheus() -> None:
    """Cumulative buckets become counts, failures of both kinds are seen, a minute without traffic is 0."""

    def value(number: float) -> Any:
        return [{"metric": {}, "value": [0, str(number)]}]

    def speeds(form: Any) -> Any:
        start, end = (float(form[name][0]) for name in ("start", "end"))
        assert end - start == 120 and start % 60 == 0
        return [{"metric": {}, "values": [[start, "40"], [start + 60, "NaN"]]}]

    buckets = [
        {"metric": {"le": le}, "value": [0, count]} for le, count in (("+Inf", "10"), ("0.1", "4"), ("0.5", "9"))
    ]
    asked: list[str] = []
    answers = {
        'finished_reason="error"': value(2),
        'finished_reason!="abort"': value(100),
        'status="5xx"': value(3),
        "http_requests_total": value(90),
        "time_to_first_token": buckets,
        "decode_time": speeds,
    }
    found = prometheus(answers, asked).evidence('baton_name="m",baton_revision="v2"', 180)
    assert (found.requests, found.errors) == (100, 3)
    assert found.ttft == Histogram((0.1, 0.5, math.inf), (4, 5, 1))
    assert found.itl.total == 0 and found.speeds == (40, 0, 0)
    assert all('baton_revision="v2"' in query for query in asked) and any("[180s]" in query for query in asked)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(400, json={"status": "error", "error": "bad"}),
        httpx.Response(200, text="<"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"status": "success"}),
        httpx.Response(200, json={"status": "success", "data": {"result": {}}}),
        httpx.Response(200, json={"status": "success", "data": {"result": [{"metric": {}}]}}),
    ],
)
def test_an_answer_that_is_none(answer: httpx.Response) -> None:
    """An error, a page that is not JSON, and JSON that is not Prometheus's are no evidence."""
    server = Prometheus("http://prometheus", httpx.MockTransport(lambda request: answer))
    with pytest.raises(NoEvidence):
        server.evidence('a="b"', 60)
