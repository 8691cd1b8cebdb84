"""The last answer of each application's scaler, where Ray Serve's controller runs the policies that follow it.

Serve pickles a policy's module by value; what all policies of the controller share has to live in another module.
"""

from __future__ import annotations

BELIEVED_S = 30.0
"""An answer older than this is not followed any more."""

_answers: dict[tuple[str, str], tuple[float, int]] = {}


def post(application: str, pool: str, at_s: float, workers: int) -> None:
    """Note an answer that was given at `at_s`."""
    _answers[application, pool] = (at_s, workers)


def look(application: str, pool: str, now_s: float) -> int | None:
    """The last answer for a pool; None when there is none to be believed."""
    at_s, workers = _answers.get((application, pool), (0.0, 0))
    return workers if now_s - at_s <= BELIEVED_S else None
