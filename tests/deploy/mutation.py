"""A wrong field in a set of objects, for tests of who notices it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.deploy.objects import Objects, of

Mutate = Callable[[Objects], None]
Mutations = dict[str, tuple[str, Mutate]]
"""By what is wrong: the set to change, and the change."""

RUNTIME = "spec.containers.0"
WORKERS = "spec.workerGroupSpecs.0"
POD = f"{WORKERS}.template.spec"
HEAD = "spec.headGroupSpec.template.spec"


def find(objects: Objects, kind: str) -> dict[str, Any]:
    """The first object of a kind."""
    return of(objects, kind)[0]


def put(kind: str, path: str, value: Any) -> Mutate:
    """Set a field of the first object of a kind; None removes it."""

    def mutate(objects: Objects) -> None:
        at: Any = find(objects, kind)
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            at = at[part]
        if value is None:
            del at[last]
        elif isinstance(at, list) and last == len(at):
            at.append(value)
        else:
            at[last] = value

    return mutate
