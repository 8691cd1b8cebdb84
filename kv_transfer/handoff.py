"""A handoff: the KV blocks of a finished prefill, on their way to a decode engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

KV_PARAMS = "kv_transfer_params"
"""The key of `SamplingParams.extra_args` under which vLLM looks for KV transfer parameters."""

REMOTE_DECODE: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a prefill leg asks of its engine: keep the blocks for somebody else to decode from."""


def kv_params(request: EngineCoreRequest) -> dict[str, Any]:
    """A copy of a request's KV transfer parameters; empty where it has none."""
    sampling = request.sampling_params
    return dict((sampling.extra_args or {}).get(KV_PARAMS) or {}) if sampling else {}


class InvalidHandoff(ValueError):
    """A prefill ended without parameters that a decode engine could pull by."""


@dataclass(frozen=True, eq=False)
class Handoff:
    """Where the KV blocks of one finished prefill are.

    Attributes:
        params: all of the connector's parameters as vLLM gave them; every one is needed (heartbeats use `tp_size`).
    """

    params: dict[str, Any]

    @classmethod
    def from_params(cls, params: dict[str, Any] | None) -> Handoff:
        """Check what a prefill engine returned.

        Raises:
            InvalidHandoff: if the blocks can't be pulled with it.
        """
        if not params or not params.get("do_remote_prefill"):
            raise InvalidHandoff("the prefill ended without a handoff")
        missing = [key for key in ("remote_engine_id", "remote_request_id", "remote_block_ids") if key not in params]
        if missing:
            raise InvalidHandoff(f"the handoff lacks {', '.join(missing)}")
        return cls(params)

    @property
    def engine_id(self) -> str:
        """The prefill engine that holds the blocks."""
        return str(self.params["remote_engine_id"])

    @property
    def leg_id(self) -> str:
        """The prefill leg that made them."""
        return str(self.params["remote_request_id"])

    @property
    def blocks(self) -> int:
        """KV blocks that it pins, of all cache groups."""
        return sum(len(group) for group in self.params["remote_block_ids"] or ())

    @property
    def tokens(self) -> int:
        """Prompt tokens that wait to be pulled; 0 where the connector does not say."""
        return int(self.params.get("remote_num_tokens") or 0)

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the prefill engine had in its prefix cache, where it says so."""
        value = self.params.get("remote_prefill_cached_tokens")
        return None if value is None else int(value)


def release_leg(handoff: Handoff) -> EngineCoreRequest:
    """A request for the prefill engine itself that ends before it begins; its only effect is that the blocks are free.

    It is vLLM's own path for a handoff that is refused (`notify_kv_transfer_request_rejected`), which in vLLM only a
    decode engine can take: `kv_transfer.own_release` lets a prefill engine take it.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=f"{handoff.leg_id}-release",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, extra_args={KV_PARAMS: dict(handoff.params)}, watermarking=False),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )
