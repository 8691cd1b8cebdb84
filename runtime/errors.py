"""Baton's errors, in one tree, and what each means to a client (`STATUS`).

BatonError
├── ConfigError            the settings are wrong; the message says what to change
├── WorkerLost             the worker of a leg is gone
├── PullFailed             the decode engine could not get the blocks
├── Unrecoverable          a request that can't go on after a loss
└── Refusal                a typed "no" to a client, before the response starts
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of everything that Baton raises."""


class ConfigError(BatonError):
    """The settings are wrong; the message says what to change."""


class WorkerLost(BatonError):
    """The worker that ran a leg is gone."""

    def __init__(self, engine_id: str, why: str) -> None:
        super().__init__(engine_id, why)
        self.engine_id, self.why = engine_id, why

    def __str__(self) -> str:
        return f"worker {self.engine_id} is lost: {self.why}"


class PullFailed(BatonError):
    """The decode engine could not get a handoff's blocks."""


class Unrecoverable(BatonError):
    """A request can't go on after a loss; the message says why."""


class Refusal(BatonError):
    """A request that is not taken, and why.

    Attributes:
        reason: a key of `STATUS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


STATUS: dict[str, int] = {
    "starting": 503,
    "no_workers": 503,
    "unauthorized": 401,
    "body_too_large": 413,
    "unsupported_endpoint": 404,
}
"""HTTP status of each reason of a refusal."""

TYPES: dict[int, str] = {
    401: "authentication_error",
    404: "NotFoundError",
    413: "invalid_request_error",
    503: "service_unavailable",
}


def openai_body(reason: str, message: str) -> dict[str, dict[str, object]]:
    """The OpenAI-shaped body of a refusal, with the typed reason as its code."""
    status = STATUS[reason]
    return {"error": {"message": message, "type": TYPES[status], "param": None, "code": reason}}
