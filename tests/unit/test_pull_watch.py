"""Which pulls hang."""

from __future__ import annotations

from kv_transfer.pull_watch import PullWatch


def test_only_what_pulls_can_hang() -> None:
    """Of three legs two pull: the third waits for its turn, however long, and its time begins when its pull does."""
    watch = PullWatch(10.0)
    for leg_id in ("a", "b", "c"):
        watch.came(leg_id)
    assert watch.look(1, 0.0) == []
    assert watch.look(2, 5.0) == []
    assert watch.look(2, 11.0) == ["a"]
    assert watch.look(1, 12.0) == []
    assert watch.look(1, 16.0) == ["b"]
    assert watch.look(0, 100.0) == []
    assert watch.look(1, 101.0) == []
    assert watch.look(1, 112.0) == ["c"]
    assert watch.look(1, 200.0) == []


def test_what_is_over_is_not_watched() -> None:
    """A leg with its blocks makes room for the next one in the order, whose time begins then."""
    watch = PullWatch(10.0)
    watch.came("a")
    watch.came("b")
    assert watch.look(1, 0.0) == []
    watch.over("a")
    watch.over("a")
    assert watch.look(1, 20.0) == []
    assert watch.look(1, 31.0) == ["b"]
