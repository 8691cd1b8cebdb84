"""Shape the prefill leg of a request: read the prompt, make one token, keep the blocks for a decode engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kv_transfer.handoff import KV_PARAMS, REMOTE_DECODE

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest


def prefill_leg(request: EngineCoreRequest, leg_id: str) -> EngineCoreRequest:
    """The request that a prefill engine runs for `request`.

    The one token it makes is thrown away (the decode engine samples the first token itself, with the client's
    parameters), so nothing that shapes sampling goes along: vLLM returns the handoff only for the finish reasons
    `length` and `stop`, and logprobs, stop strings or a grammar would cost time for nothing.
    """
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=1,
        min_tokens=0,
        temperature=0.0,
        detokenize=False,
        extra_args={KV_PARAMS: dict(REMOTE_DECODE)},
    )
    return msgspec.structs.replace(
        request,
        request_id=leg_id,
        external_req_id=None,
        sampling_params=params,
        # A structured-output request carries these; the prefill leg has no grammar.
        reasoning_ended=None,
        reasoning_parser_kwargs=None,
    )
