"""Take up structured output in the middle: an engine that continues a stream advances its grammar by the tokens made.

vLLM 0.32 starts every request's grammar at its beginning; a continued stream has its first tokens in the prompt. So
in Baton's engine cores a new grammar accepts those tokens before it constrains the next one. This is the one place
where Baton changes what an engine core does; `tests/unit/test_grammar.py` drives vLLM's own classes through it.
"""

from __future__ import annotations

from typing import Any

GRAMMAR_MADE = "baton_grammar_made"
"""The key of `SamplingParams.extra_args` that says how many of the prompt's last tokens belong to the answer."""


class GrammarRejected(Exception):
    """The tokens made so far don't follow the grammar: it can't be the one that they were made with."""


def install() -> None:
    """Have vLLM's grammars of this process begin where the stream is."""
    from vllm.v1.structured_output import StructuredOutputManager

    create = StructuredOutputManager._create_grammar

    def create_advanced(manager: Any, request: Any) -> Any:
        grammar = create(manager, request)
        extra = request.sampling_params.extra_args if request.sampling_params else None
        if made := (extra or {}).get(GRAMMAR_MADE, 0):
            advance(manager, request, grammar, made)
        return grammar

    if create.__name__ != create_advanced.__name__:  # else it is done already
        StructuredOutputManager._create_grammar = create_advanced


def advance(manager: Any, request: Any, grammar: Any, made: int) -> None:
    """Have `grammar` accept the last `made` tokens of the request's prompt that it constrains.

    Tokens of a model's reasoning are free, where the engine knows the reasoning parser; `reasoning_ended` is what vLLM
    goes by for the tokens to come, so it is set here for those that were.

    Raises:
        GrammarRejected: vLLM then fails the request, and only this one.
    """
    prompt, structured = list(request.prompt_token_ids), request.structured_output_request
    before, answer = prompt[:-made], prompt[-made:]
    reasoner = None if manager.enable_in_reasoning or structured.reasoning_ended else manager._get_reasoner(request)
    if reasoner is not None and not (structured.reasoning_ended is None and reasoner.is_reasoning_end(before)):
        structured.reasoning_ended = False
        ended = _end_of_reasoning(reasoner, before, answer)
        if ended is None:
            return
        answer = answer[ended:]
    structured.reasoning_ended = True
    if not grammar.accept_tokens(request.request_id, answer):
        raise GrammarRejected(f"the grammar of {request.request_id} does not accept the {made} tokens made so far")


def _end_of_reasoning(reasoner: Any, before: list[int], answer: list[int]) -> int | None:
    """How many tokens of the answer are reasoning, its end included; None when it goes on."""
    for count in range(1, len(answer) + 1):
        if reasoner.is_reasoning_end_streaming(before + answer[:count], answer[count - 1 : count]):
            return count
    return None
