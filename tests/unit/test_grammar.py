"""Structured output that is continued elsewhere: vLLM's own grammars, taken up in the middle."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from decode.resume import resume, why_not_resumable
from kv_transfer import grammar
from runtime.demo_model import demo_model_dir
from runtime.errors import ConfigError
from tests.unit.test_resume import engine_request

pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated:DeprecationWarning")  # vLLM's call

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TEXT = '{"city": "Paris", "people": 2100000}'
THINK_END = 2


class Reasoner:
    """A reasoning parser: everything up to the end token is free."""

    def is_reasoning_end(self, ids: list[int]) -> bool:
        return THINK_END in ids

    def is_reasoning_end_streaming(self, ids: list[int], delta: list[int]) -> bool:
        return THINK_END in delta


@pytest.fixture(scope="module")
def manager() -> StructuredOutputManager:
    """vLLM's manager with the demo model's tokenizer, in a process that Baton has prepared."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        model = demo_model_dir(build=False)
    except ConfigError as error:
        pytest.skip(str(error))
    grammar.install()
    grammar.install()  # twice does no harm
    return StructuredOutputManager(AsyncEngineArgs(model=str(model)).create_engine_config())


def started(manager: StructuredOutputManager, made: list[int], reasoning_ended: bool | None = None) -> Any:
    """The engine's request of a stream that goes on after `made`, with its grammar ready."""
    params = SamplingParams(max_tokens=100, structured_outputs=StructuredOutputsParams(json=json.dumps(SCHEMA)))
    params.structured_outputs._backend = "xgrammar"  # as vLLM's front end sets it
    request = engine_request(params)
    request.reasoning_ended = reasoning_ended
    assert why_not_resumable(request) is None
    engine = Request.from_engine_core_request(resume(request, made) if made else request, None)
    manager.grammar_init(engine)
    structured = engine.structured_output_request
    if not isinstance(structured._grammar, Exception):
        structured._grammar.exception(60)
    return engine


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_grammar_goes_on_where_the_stream_is(manager: StructuredOutputManager, share: float) -> None:
    """It accepts the rest of the document and nothing else; a grammar from its beginning would accept neither."""
    tokens = manager.tokenizer.encode(TEXT)
    cut = max(1, int(share * len(tokens)))
    engine = started(manager, tokens[:cut])
    resumed = engine.structured_output_request.grammar
    assert resumed.validate_tokens(tokens[cut:]) == tokens[cut:]
    assert resumed.validate_tokens(tokens) != tokens
    fresh = started(manager, []).structured_output_request.grammar
    assert fresh.validate_tokens(tokens) == tokens
    assert fresh.validate_tokens(tokens[cut:]) != tokens[cut:]


def test_tokens_that_the_grammar_never_made(manager: StructuredOutputManager) -> None:
    """The request fails, by vLLM's own way for a grammar that can't be had, and no other does."""
    engine = started(manager, manager.tokenizer.encode("hello"))
    assert isinstance(engine.structured_output_request.grammar, grammar.GrammarRejected)


@pytest.mark.parametrize("thought", ["", "I think, therefore"])
def test_reasoning_is_free(manager: StructuredOutputManager, monkeypatch: pytest.MonkeyPatch, thought: str) -> None:
    """Only what came after the model's reasoning goes through the grammar."""
    monkeypatch.setattr(manager, "reasoner_cls", lambda tokenizer: Reasoner())
    tokens = manager.tokenizer.encode(TEXT)
    free = [*manager.tokenizer.encode(thought), THINK_END]
    engine = started(manager, [*free, *tokens[:4]])
    assert engine.structured_output_request.reasoning_ended is True
    assert engine.structured_output_request.grammar.validate_tokens(tokens[4:]) == tokens[4:]


def test_reasoning_that_goes_on(manager: StructuredOutputManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that died while it reasoned: its grammar is still at the beginning."""
    monkeypatch.setattr(manager, "reasoner_cls", lambda tokenizer: Reasoner())
    tokens = manager.tokenizer.encode(TEXT)
    engine = started(manager, manager.tokenizer.encode("I think"))
    assert engine.structured_output_request.reasoning_ended is False
    assert engine.structured_output_request.grammar.validate_tokens(tokens) == tokens
