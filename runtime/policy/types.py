"""The vocabulary of decisions: what a policy sees and what it answers. Plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerView:
    """One worker as a front end sees it at one moment."""

    engine_id: str
    requests: int  # legs in flight from this front end
    tokens: int  # prompt tokens (prefill) or prompt and answer tokens (decode) of those legs


@dataclass(frozen=True)
class Snapshot:
    """The workers that can take work now."""

    prefill: tuple[WorkerView, ...]
    decode: tuple[WorkerView, ...]


@dataclass(frozen=True)
class RequestView:
    """What a policy may know of a request."""

    prompt_tokens: int
    can_disaggregate: bool = True


@dataclass(frozen=True)
class Disaggregated:
    """Prefill on one worker, decode on another."""

    prefill: str
    decode: str
    reason: str = "default"


@dataclass(frozen=True)
class Local:
    """Both halves on one worker."""

    decode: str  # a decode worker, or a borrowed one of the other pool
    reason: str


@dataclass(frozen=True)
class Refused:
    """No plan; a typed reason."""

    reason: str


Plan = Disaggregated | Local
