"""Baton's errors, in one tree, and what each means to a client (`STATUS`).

BatonError
├── ConfigError            the settings are wrong; the message says what to change
├── WorkerLost             the worker of a leg is gone
│   └── WorkerDrained      it was to go, and its time to finish the leg was over
├── LegFailed              the engine ended a leg with an error
│   └── PullFailed         because it could not get the handoff's blocks
├── Unrecoverable          a request that can't go on after a loss
└── Refusal                a typed "no" to a client, before the response starts
"""

from __future__ import annotations

import math


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


class WorkerDrained(WorkerLost):
    """The worker that ran a leg was to go, and its time to finish was over. Nobody's fault: costs no retry."""


class LegFailed(BatonError):
    """An engine ended a leg with an error, and lives on."""


class PullFailed(LegFailed):
    """The decode engine could not get a handoff's blocks."""


class Unrecoverable(BatonError):
    """A request can't go on after a loss; the message says why."""


class Refusal(BatonError):
    """A request that is not taken, and why.

    Attributes:
        reason: a key of `STATUS`.
        retry_after_s: when it makes sense to ask again, in seconds from now, where that is known.
    """

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason, message, retry_after_s)
        self.reason, self.message, self.retry_after_s = reason, message, retry_after_s

    def __str__(self) -> str:
        return self.message


STATUS: dict[str, int] = {
    "overloaded": 429,
    "deadline": 504,
    "starting": 503,
    "no_workers": 503,
    "context_length_exceeded": 400,
    "invalid_header": 400,
    "malformed": 400,
    "unauthorized": 401,
    "local_only": 403,
    "body_too_large": 413,
    "unsupported_endpoint": 404,
}
"""HTTP status of each reason of a refusal."""

TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "NotFoundError",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}

ANTHROPIC_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

LONGEST_RETRY_AFTER_S = 3600


def openai_body(refusal: Refusal) -> dict[str, object]:
    """The OpenAI-shaped body of a refusal, with the typed reason as its code."""
    kind = TYPES[STATUS[refusal.reason]]
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.reason}}


def anthropic_body(refusal: Refusal) -> dict[str, object]:
    """The same as Anthropic's clients expect it."""
    return {"type": "error", "error": {"type": ANTHROPIC_TYPES[STATUS[refusal.reason]], "message": refusal.message}}


def retry_after(refusal: Refusal) -> int | None:
    """The value of `Retry-After`: whole seconds, rounded up."""
    if refusal.retry_after_s is None:
        return None
    return min(LONGEST_RETRY_AFTER_S, max(1, math.ceil(refusal.retry_after_s)))
