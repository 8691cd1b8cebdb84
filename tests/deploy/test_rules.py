"""Every manifest of every preset by rule, and that a disagreement of each kind is noticed."""

from __future__ import annotations

import pytest

from tests.deploy.mutation import Mutate, Mutations
from tests.deploy.objects import Rule
from tests.deploy.rendered import SETS, fresh
from tests.deploy.rules import NOUNS, broken


@pytest.mark.parametrize("name", SETS)
def test_rules(name: str) -> None:
    """What schemas can't see."""
    assert not broken(SETS[name])


@pytest.mark.parametrize(
    ("rules", "set_name", "mutate"),
    [pytest.param(noun.RULES, *mutation, id=name) for noun in NOUNS for name, mutation in noun.MUTATIONS.items()],
)
def test_rules_notice(rules: tuple[Rule, ...], set_name: str, mutate: Mutate) -> None:
    """A disagreement that schemas accept fails a rule about its noun."""
    objects = fresh(set_name)
    mutate(objects)
    assert broken(objects, rules)


@pytest.mark.parametrize(
    ("rule", "mutations"),
    [pytest.param(rule, noun.MUTATIONS, id=rule.__name__) for noun in NOUNS for rule in noun.RULES],
)
def test_every_rule_notices_something(rule: Rule, mutations: Mutations) -> None:
    """No rule is there that none of its noun's mutations breaks."""

    def notices(set_name: str, mutate: Mutate) -> bool:
        objects = fresh(set_name)
        mutate(objects)
        return any(rule(objects))

    assert any(notices(*mutation) for mutation in mutations.values())
