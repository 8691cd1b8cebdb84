"""Outputs of several steps, joined as vLLM's front end may take them."""

from __future__ import annotations

import numpy as np
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from runtime.steps import as_one_step


def out(name: str, *tokens: int, **more: object) -> EngineCoreOutput:
    """An output of one step."""
    return EngineCoreOutput(request_id=name, new_token_ids=list(tokens), **more)  # type: ignore[arg-type]


def joined(*steps: list[EngineCoreOutput]) -> list[tuple[str, list[int], FinishReason | None]]:
    """Request, tokens and end of each output of `steps` as one."""
    one = as_one_step([EngineCoreOutputs(outputs=step) for step in steps])
    return [(output.request_id, output.new_token_ids, output.finish_reason) for output in one.outputs]


def logprobs(token: int) -> LogprobsLists:
    """Of one token."""
    return LogprobsLists(np.array([[token]]), np.array([[-1.0]]), np.array([1]))


def test_tokens_of_a_request_are_joined_in_order() -> None:
    """With what the first says of the prompt and the last of the end."""
    first = out("a", 1, prefill_stats=PrefillStats())
    end = out("a", 4, finish_reason=FinishReason.STOP, stop_reason=4)
    steps = [[first, out("b", 7)], [out("a", 2, 3)], [out("b", 8), end]]
    assert joined(*steps) == [("a", [1, 2, 3, 4], FinishReason.STOP), ("b", [7, 8], None)]
    assert first.prefill_stats is not None and first.stop_reason == 4


def test_what_carries_more_than_tokens_stays_alone() -> None:
    """Logprobs belong to their tokens, and a second output of the same id after the end is another one's."""
    steps = [[out("a", 1, new_logprobs=logprobs(1))], [out("a", 2, new_logprobs=logprobs(2))]]
    assert joined(*steps) == [("a", [1], None), ("a", [2], None)]
    params = out("a", 2, kv_transfer_params={"x": 1})
    assert joined([out("a", 1)], [params]) == [("a", [1], None), ("a", [2], None)]
    done = FinishReason.LENGTH
    assert joined([out("a", 1, finish_reason=done)], [out("a", 2)]) == [("a", [1], done), ("a", [2], None)]


def test_one_step_is_left_as_it_is() -> None:
    """The usual case costs nothing."""
    step = EngineCoreOutputs(outputs=[out("a", 1)])
    assert as_one_step([step]) is step
