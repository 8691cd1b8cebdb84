"""How long an application is kept, and what it is called."""

from __future__ import annotations

from typing import Any

import pytest

from kserve_adapter.keeper import SILENCE_S, Membership
from kserve_adapter.revision import revision_name
from runtime.config import Config
from runtime.config_file import parse


def test_an_application_outlives_its_last_predictor_by_the_delay() -> None:
    """Leave, wait, gone; not a moment earlier."""
    members = Membership(linger_s=10)
    assert members.join("a", 0) and members.join("b", 0)
    members.leave("a", 5)
    assert not members.expired(20)
    members.leave("b", 20)
    assert not members.expired(29.9)
    assert members.expired(30)


def test_a_predictor_in_time_keeps_it() -> None:
    """Who joins within the delay finds everything as it was, and the delay starts anew with the next goodbye."""
    members = Membership(linger_s=10)
    members.join("a", 0)
    members.leave("a", 1)
    members.join("b", 10)
    assert not members.expired(15)
    members.leave("b", 16)
    assert not members.expired(25) and members.expired(26)


def test_the_silent_are_gone() -> None:
    """A killed predictor never says goodbye; its heartbeats end."""
    members = Membership(linger_s=10)
    members.join("a", 0)
    assert not members.join("a", 5)
    assert not members.expired(5 + SILENCE_S)
    assert not members.expired(6 + SILENCE_S)
    assert members.expired(16 + SILENCE_S)


def test_a_keeper_that_was_restarted_waits_for_heartbeats() -> None:
    """Nobody has joined yet: the delay counts from the first look."""
    members = Membership(linger_s=10)
    assert not members.expired(100) and not members.expired(109)
    assert members.expired(110)


BASE: dict[str, Any] = {"model": "/mnt/models", "served_model_name": "Llama 3.1/70B"}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"front_end": {"max_requests": 7}}, True),
        ({"name": "other"}, True),
        ({"model": "/mnt/models-2"}, False),
        ({"engine_args": {"max_model_len": 4096}}, False),
        ({"decode": {"replicas": 2}}, False),
    ],
)
def test_an_application_is_named_by_what_it_is_made_of(change: dict[str, Any], same: bool) -> None:
    """Two predictors share pools exactly when these are the same; the name is a valid one."""
    name = revision_name(parse(BASE))
    assert name.startswith("llama-3-1-70b-")
    assert Config(name=name).name == name
    assert (revision_name(parse({**BASE, **change})) == name) is same
