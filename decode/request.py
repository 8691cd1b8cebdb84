"""Shape the legs that decode engines run: with a handoff, or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kv_transfer.grammar import GRAMMAR_MADE
from kv_transfer.handoff import KV_PARAMS, Handoff

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

NOT_FOR_CLIENTS = frozenset({KV_PARAMS, "ec_transfer_params", "kv_cache_report_mode", GRAMMAR_MADE})
"""Extra arguments of sampling parameters that vLLM's engine, or Baton's part of it, obeys. Clients reach them by
`vllm_xargs`."""


def decode_leg(request: EngineCoreRequest, leg_id: str, handoff: Handoff | None) -> EngineCoreRequest:
    """The request that a decode engine runs: pulling the blocks of `handoff`, or reading the prompt itself."""
    params = request.sampling_params
    if handoff is not None and params is not None:
        params = _with_extra_arg(params, KV_PARAMS, dict(handoff.params))
    return msgspec.structs.replace(request, request_id=leg_id, sampling_params=params)


def without_engine_args(params: SamplingParams) -> SamplingParams:
    """`params` without the extra arguments that only Baton may give to an engine.

    A client's own KV parameters could name a host, or kill an engine by an assertion.
    """
    extra = params.extra_args or {}
    if not extra.keys() & NOT_FOR_CLIENTS:
        return params
    stripped = params.clone()
    stripped.extra_args = {key: value for key, value in extra.items() if key not in NOT_FOR_CLIENTS} or None
    return stripped


def _with_extra_arg(params: SamplingParams, key: str, value: Any) -> SamplingParams:
    changed = params.clone()
    changed.extra_args = {**(params.extra_args or {}), key: value}
    return changed
