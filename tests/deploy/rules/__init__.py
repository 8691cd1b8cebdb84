"""What no schema can see: that the objects agree with each other, with the code, and with what webhooks refuse.

A module has the `RULES` about one noun, and `MUTATIONS`: what they must notice.
"""

from __future__ import annotations

from tests.deploy.objects import Objects, Rule
from tests.deploy.rules import containers, knative, kserve, kuberay, patience, probes, revisions, scaling, selection

NOUNS = (containers, patience, probes, selection, scaling, kserve, knative, kuberay, revisions)
RULES: tuple[Rule, ...] = tuple(rule for noun in NOUNS for rule in noun.RULES)


def broken(objects: Objects, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """Everything that breaks a rule."""
    return [problem for rule in rules for problem in rule(objects)]
