"""One HTTP request as admission sees it: who asks, how urgently, until when, and whether it was let in or refused.

The edge makes a `Visit` of each request's headers and leaves it in the context of whatever the app does for it. All
that the app asks of the cluster for one response (`n` choices, a list of prompts) is one visit, let in or refused
together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from zlib import crc32

from runtime.admission_settings import AdmissionSettings
from runtime.errors import Refusal
from runtime.metrics import REFUSALS
from runtime.policy.admission import CLASSES, level_of

PRIORITY_HEADER = b"x-baton-priority"
DEADLINE_HEADER = b"x-baton-deadline-ms"

SHARED_TENANTS = 1024
"""Tenants without a name in the settings are told apart up to so many: anybody can make up the value of a header, and
everybody's wait is bounded only while there are not more tenants than this."""


@dataclass(eq=False)
class Visit:
    """A response to be, from the request's arrival until it begins.

    Attributes:
        level: class of priority; None leaves it to the body's `priority`.
        best_level: the best class that this tenant gets.
        deadline: monotonic seconds; not begun by then, nobody wants it any more.
        admitted: whether it was let in; the rest of its requests then follow at once.
        started: whether the response has begun. It can't be refused any more.
        refusal: why there is no response.
    """

    tenant: str = ""
    level: int | None = None
    best_level: int = 0
    deadline: float | None = None
    admitted: bool = False
    started: bool = False
    refusal: Refusal | None = None

    def level_for(self, priority: int) -> int:
        """The class of a request with vLLM's `priority`."""
        return max(self.best_level, level_of(priority) if self.level is None else self.level)

    def refuse(self, refusal: Refusal) -> None:
        """Refuse it, once and for all of its requests, unless it is too late for that."""
        if self.refusal is None and not self.started:
            self.refusal = refusal
            REFUSALS.labels(reason=refusal.reason).inc()


current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)
"""The visit that the running code works for."""


class Reception:
    """Makes visits of requests' headers."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._names = {digest: name for name, t in settings.tenants.items() for digest in t.api_keys_sha256}
        self._header = settings.tenant_header.encode() if settings.tenant_header else None

    def visit(self, headers: Mapping[bytes, bytes], key_digest: bytes | None) -> Visit:
        """The visit of a request with these headers (lower case) and the digest of its API key.

        Raises:
            Refusal: `invalid_header`.
        """
        tenant = self._tenant(headers, key_digest)
        named = self._settings.tenants.get(tenant)
        best = CLASSES.index(named.best_priority) if named else 0
        return Visit(tenant, _level(headers.get(PRIORITY_HEADER)), best, self._deadline(headers.get(DEADLINE_HEADER)))

    def _tenant(self, headers: Mapping[bytes, bytes], key_digest: bytes | None) -> str:
        if key_digest is not None and (name := self._names.get(key_digest.hex())):
            return name
        value = headers.get(self._header) if self._header else None
        if value is None:
            return f"~{crc32(key_digest) % SHARED_TENANTS}" if key_digest is not None else ""
        name = value.decode("latin-1")
        return name if name in self._settings.tenants else f"~{crc32(value) % SHARED_TENANTS}"

    def _deadline(self, value: bytes | None) -> float | None:
        seconds = self._settings.deadline_s
        if value is not None:
            if not value.isdigit():
                raise Refusal("invalid_header", f"{DEADLINE_HEADER.decode()} must be a whole number of milliseconds.")
            seconds = min(int(value[:12]) / 1000.0, seconds or float("inf"))
        return None if seconds is None else time.monotonic() + seconds


def _level(value: bytes | None) -> int | None:
    if value is None:
        return None
    word = value.decode("latin-1").strip().lower()
    if word in CLASSES:
        return CLASSES.index(word)
    try:
        return level_of(int(word[:12]))
    except ValueError:
        names = ", ".join(CLASSES)
        raise Refusal("invalid_header", f"{PRIORITY_HEADER.decode()} must be one of {names}, or a number.") from None
