"""Outputs of several engine steps as those of one: what a front end that has fallen behind makes of its backlog.

vLLM's front end takes any number of tokens of a request at once, as speculative decoding makes them. Its work and its
events to the client are for each output and not for each token, so joined outputs are how it catches up.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

_JOINED = {"request_id", "new_token_ids", "finish_reason", "stop_reason"}
_REST = [name for name in EngineCoreOutput.__struct_fields__ if name not in _JOINED]
_PLAIN = EngineCoreOutput(request_id="", new_token_ids=[])


def as_one_step(steps: list[EngineCoreOutputs]) -> EngineCoreOutputs:
    """All outputs of `steps`, in order. Those of one request are joined where they carry nothing but tokens: the first
    may also tell of the prompt, the last of the end.
    """
    if len(steps) == 1:
        return steps[0]
    outputs: list[EngineCoreOutput] = []
    last: dict[str, EngineCoreOutput] = {}
    for output in (output for step in steps for output in step.outputs):
        before = last.get(output.request_id)
        if before is None or before.finished or not (_plain(before, {"prefill_stats"}) and _plain(output)):
            outputs.append(output)
            last[output.request_id] = output
            continue
        before.new_token_ids += output.new_token_ids
        before.finish_reason, before.stop_reason = output.finish_reason, output.stop_reason
    return EngineCoreOutputs(outputs=outputs)


def _plain(output: EngineCoreOutput, but: Iterable[str] = ()) -> bool:
    """Whether an output has nothing but tokens, a reason to end, and what is named."""
    return all(getattr(output, name) is getattr(_PLAIN, name) for name in _REST if name not in but)
