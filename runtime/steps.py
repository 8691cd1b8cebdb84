"""Outputs of several engine steps as those of one: what a front end that has fallen behind makes of its backlog.

vLLM's front end takes any number of tokens of a request at once, as speculative decoding makes them. Its work and its
events to the client are for each output and not for each token, so joined outputs are how it catches up.
"""

from __future__ import annotations

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
    last: dict[str, EngineCoreOutput] = {}  # what more tokens of a request may be joined to
    for output in (output for step in steps for output in step.outputs):
        extras = _extras(output)
        before = last.pop(output.request_id, None)
        if before is None or extras:
            outputs.append(output)
            joined, open_end = output, extras in ([], ["prefill_stats"])
        else:
            before.new_token_ids += output.new_token_ids
            before.finish_reason, before.stop_reason = output.finish_reason, output.stop_reason
            joined, open_end = before, True
        if open_end and not output.finished:
            last[output.request_id] = joined
    return EngineCoreOutputs(outputs=outputs)


def _extras(output: EngineCoreOutput) -> list[str]:
    """What an output carries beside tokens and a reason to end."""
    return [name for name in _REST if getattr(output, name) is not getattr(_PLAIN, name)]
