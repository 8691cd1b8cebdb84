"""Let engines on a CPU sample with a seed while a prompt is read in several steps.

After each step but the last, vLLM 0.32 takes back the random number that it drew for nothing: it sets the generator's
offset, which a CPU's generator doesn't have, and the engine core dies of it. In Baton's engines on a CPU such a
generator gets the state back that it had before the step.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Have vLLM's model runners of this process, if it is one for a CPU, spare the generators of unfinished prompts."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, keep_books = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def sample_sparing(runner: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in _unfinished(runner).values()]
        output = sample(runner, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    def keep_books_sparing(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators, spared = runner.input_batch.generators, _unfinished(runner)
        for place in spared:
            del generators[place]
        try:
            return keep_books(runner, *args, **kwargs)
        finally:
            generators.update(spared)

    if sample.__name__ != sample_sparing.__name__:  # else it is done already
        CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = sample_sparing, keep_books_sparing


def _unfinished(runner: Any) -> dict[int, Any]:
    """The generators of requests whose sampled token is thrown away, by their place in the batch."""
    thrown_away = runner.discard_request_mask.np
    return {place: generator for place, generator in runner.input_batch.generators.items() if thrown_away[place]}
