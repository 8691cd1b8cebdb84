"""Continue a stream whose worker died: the same request, with the tokens that were made moved into the prompt.

The front end's state (detokenizer, stop strings, logprobs, usage) goes on untouched: it sees one request whose tokens
keep coming. What a decode engine has to be told anew is here.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from kv_transfer.grammar import GRAMMAR_MADE

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest


def why_not_resumable(request: EngineCoreRequest) -> str | None:
    """Why a stream of `request` can't go on elsewhere, or None when it can."""
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "its prompt is not made of tokens"
    return None


def is_exact(request: EngineCoreRequest) -> bool:
    """Whether a continued stream follows the same distribution, token by token, as an undisturbed one.

    A seed's random numbers are others after the loss. A presence penalty counts twice once a token from before the
    loss comes again: engines penalize the tokens that they made themselves, and a bias stands in for the others.
    """
    params = request.sampling_params
    return params is not None and (params.temperature == 0.0 or params.seed is None) and not params.presence_penalty


def resume(request: EngineCoreRequest, made: list[int]) -> EngineCoreRequest:
    """The request that goes on after the tokens `made`."""
    assert request.sampling_params is not None and request.prompt_token_ids is not None
    return msgspec.structs.replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *made],
        prompt_is_token_ids=None,
        sampling_params=_params_after(request.sampling_params, made),
    )


def _params_after(params: SamplingParams, made: list[int]) -> SamplingParams:
    rest = params.clone()
    if rest.max_tokens is not None:
        rest.max_tokens -= len(made)
    rest.min_tokens = max(0, rest.min_tokens - len(made))
    if rest.structured_outputs is not None:
        rest.extra_args = {**(rest.extra_args or {}), GRAMMAR_MADE: len(made)}
    rest.prompt_logprobs = None  # they went to the client with the first token
    if rest.seed is not None:
        rest.seed += len(made)  # or the random numbers of the first tokens would come again
    if rest.presence_penalty or rest.frequency_penalty:
        # A repetition penalty covers the prompt, too, and so needs nothing.
        rest.logit_bias = dict(rest.logit_bias or {})
        for token, times in Counter(made).items():
            penalty = rest.presence_penalty + times * rest.frequency_penalty
            rest.logit_bias[token] = rest.logit_bias.get(token, 0.0) - penalty
    return rest
