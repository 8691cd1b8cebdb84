"""The request that goes on after a loss."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from decode.request import without_engine_args
from decode.resume import is_exact, resume, why_not_resumable
from kv_transfer.grammar import GRAMMAR_MADE

PROMPT = [10, 11, 12]


def engine_request(params: SamplingParams | None, **fields: Any) -> EngineCoreRequest:
    """A request as vLLM's front end makes it."""
    return EngineCoreRequest(
        **{
            "request_id": "r",
            "prompt_token_ids": PROMPT,
            "mm_features": None,
            "sampling_params": params,
            "pooling_params": None,
            "arrival_time": 0.0,
            "lora_request": None,
            "cache_salt": None,
            "data_parallel_rank": None,
            **fields,
        }
    )


def test_what_is_left_to_do() -> None:
    """The tokens that were made move into the prompt, and count against every limit."""
    request = engine_request(SamplingParams(max_tokens=20, min_tokens=5, seed=7, prompt_logprobs=1))
    rest = resume(request, [1, 2, 3])
    assert rest.prompt_token_ids == [*PROMPT, 1, 2, 3]
    params = rest.sampling_params
    assert params is not None
    assert (params.max_tokens, params.min_tokens, params.seed, params.prompt_logprobs) == (17, 2, 10, None)
    assert request.sampling_params is not None
    assert (request.sampling_params.max_tokens, request.prompt_token_ids) == (20, PROMPT), "the request is not changed"


def test_penalties_count_what_was_made() -> None:
    """A bias stands in for the tokens that the new engine takes for prompt."""
    request = engine_request(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: 1.0}))
    params = resume(request, [1, 1, 2]).sampling_params
    assert params is not None
    assert params.logit_bias == {1: 1.0 - 0.5 - 0.5, 2: -0.75}


def test_structured_output_takes_its_grammar_along() -> None:
    """The engine is told how many tokens its grammar has to accept first."""
    grammar = StructuredOutputsParams(regex="a+")
    params = resume(engine_request(SamplingParams(structured_outputs=grammar)), [1, 2]).sampling_params
    assert params is not None
    assert params.extra_args == {GRAMMAR_MADE: 2}
    assert resume(engine_request(SamplingParams()), [1, 2]).sampling_params.extra_args is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("params", "exact"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "seed": 3}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "seed": 3}, False),
        ({"temperature": 0.0, "presence_penalty": 0.1}, False),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, True),
    ],
)
def test_what_is_exact(params: dict[str, Any], exact: bool) -> None:
    """Seeded sampling and a presence penalty can't be continued token by token."""
    assert is_exact(engine_request(SamplingParams(**params))) is exact


def test_what_can_not_go_on() -> None:
    """A prompt of embeddings has no tokens to go on from."""
    assert why_not_resumable(engine_request(SamplingParams())) is None
    assert why_not_resumable(engine_request(SamplingParams(), prompt_token_ids=None)) is not None


@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", GRAMMAR_MADE])
def test_a_client_can_not_talk_to_the_engine(key: str) -> None:
    """What Baton alone may tell an engine is taken out of a client's `vllm_xargs`; the rest stays."""
    params = SamplingParams(extra_args={key: {"remote_host": "10.0.0.1"}, "mine": 1})
    assert without_engine_args(params).extra_args == {"mine": 1}
    assert without_engine_args(SamplingParams(extra_args={key: 1})).extra_args is None
    assert without_engine_args(clean := SamplingParams(extra_args={"mine": 1})) is clean
