"""Where each half of a request runs, whatever the workers tell: properties of single decisions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.policy.pool import Pool
from runtime.policy.routing import REASONS, route
from runtime.policy.types import (
    PRESETS,
    Cost,
    Disaggregated,
    Refused,
    RequestView,
    RoutingSettings,
    Snapshot,
    WorkerView,
)
from tests.unit.test_routing import users

COSTS = st.builds(Cost, st.floats(0, 0.1), st.floats(1e-6, 0.01))
TOKENS = st.integers(0, 20_000)
VIEWS = st.builds(
    WorkerView,
    engine_id=st.just(""),
    requests=st.integers(0, 50),
    tokens=TOKENS,
    queued_tokens=st.none() | st.just(0) | TOKENS,
    queued_requests=st.integers(0, 20),
    streams=st.just(0) | st.integers(0, 300),
    pulling_tokens=st.just(0) | TOKENS,
    free_blocks=st.none() | st.integers(0, 5000),
    max_streams=st.none() | st.integers(1, 300),
    max_step_tokens=st.none() | st.integers(64, 8192),
    prefill=st.none() | COSTS,
    step=st.none() | COSTS,
    pull=st.none() | COSTS,
)


def named(letter: str, views: list[WorkerView]) -> Pool:
    """The views as a pool of workers of different names."""
    return Pool(replace(view, engine_id=f"{letter}{place}") for place, view in enumerate(views))


SNAPSHOTS = st.builds(
    Snapshot,
    st.lists(VIEWS, max_size=7).map(lambda views: named("p", views)),
    st.lists(VIEWS, max_size=7).map(lambda views: named("d", views)),
    st.floats(0, 0.1),
)
REQUESTS = st.builds(
    RequestView,
    prompt_tokens=st.integers(1, 30_000),
    can_disaggregate=st.booleans(),
    request_id=st.text("abc", max_size=3),
    cached=st.dictionaries(st.sampled_from(["p0", "p1", "p5", "d0", "d2", "d6", "gone"]), TOKENS),
)
SETTINGS = st.sampled_from([preset for name, preset in PRESETS.items() if name not in ("round-robin", "least-loaded")])


@settings(max_examples=300, deadline=None)
@given(REQUESTS, SNAPSHOTS, SETTINGS)
def test_plans_only_on_workers_that_are_there(
    request_view: RequestView, snapshot: Snapshot, routing: RoutingSettings
) -> None:
    """Each half on a worker of the snapshot, of the right pool; refused only when there is nobody; a known reason."""
    plan = route(request_view, snapshot, routing)
    assert plan.reason in REASONS
    assert isinstance(plan, Refused) == (not snapshot.prefill and not snapshot.decode)
    assert users(plan) <= {view.engine_id for pool in (snapshot.prefill, snapshot.decode) for view in pool}
    if isinstance(plan, Disaggregated):
        assert request_view.can_disaggregate
        assert plan.prefill.startswith("p")
        assert plan.decode.startswith("d")
    if not isinstance(plan, Refused):
        assert plan.predicted
        assert plan.predicted.ttft_s >= 0


MORE = st.fixed_dictionaries(
    {},
    optional={
        "tokens": TOKENS,
        "queued_tokens": TOKENS,
        "queued_requests": TOKENS,
        "streams": st.integers(0, 300),
        "pulling_tokens": TOKENS,
    },
)


@settings(max_examples=1000, deadline=None)
@given(REQUESTS, SNAPSHOTS, SETTINGS, st.sampled_from(["p0", "p1", "p5", "d0", "d1", "d6"]), MORE)
def test_more_load_never_attracts(
    request_view: RequestView, snapshot: Snapshot, routing: RoutingSettings, name: str, more: dict[str, int]
) -> None:
    """A worker that was not chosen is not chosen when it has more to do and all else is the same."""
    view = Pool.of(snapshot.prefill).find(name) or Pool.of(snapshot.decode).find(name)
    before = route(request_view, snapshot, routing)
    if view is None or name in users(before):
        return
    added = {key: value + (getattr(view, key) or 0) for key, value in more.items()}
    if view.queued_tokens is None:
        added.pop("queued_tokens", None)  # from unmeasured to measured is not more load
    after = route(request_view, snapshot.with_view(replace(view, **added)), routing)
    assert name not in users(after)


@settings(max_examples=100, deadline=None)
@given(SNAPSHOTS, st.lists(st.tuples(st.sampled_from(["p0", "p1", "d0", "d3"]), VIEWS), max_size=8), REQUESTS)
def test_updated_snapshot_equals_a_new_one(
    snapshot: Snapshot, news: list[tuple[str, WorkerView]], request_view: RequestView
) -> None:
    """`with_view` carries on the order by load correctly."""
    for name, view in news:
        if any(name in Pool.of(pool).places for pool in (snapshot.prefill, snapshot.decode)):
            snapshot = snapshot.with_view(replace(view, engine_id=name))
    fresh = Snapshot(tuple(snapshot.prefill), tuple(snapshot.decode), snapshot.handoff_s)
    assert route(request_view, snapshot) == route(request_view, fresh)
    for pool in (snapshot.prefill, snapshot.decode):
        by_load = Pool.of(pool).least_loaded(3, 1)
        assert [view.load for view in by_load] == sorted(view.load for view in pool)[:3] or len(pool) <= 3
