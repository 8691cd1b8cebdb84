"""Seeded sampling beside prompts that are read in several steps, on vLLM's own model runner for CPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from kv_transfer import cpu_sampling


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM is not installed for a CPU")
def test_an_unfinished_prompt_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generator is as before the step, and vLLM's bookkeeping does not see it; the others have drawn."""

    def sample(runner: Any) -> list[float]:
        generators = runner.input_batch.generators
        return [torch.rand(1, generator=generators[place]).item() for place in sorted(generators)]

    def keep_books(runner: Any) -> list[int]:
        return sorted(runner.input_batch.generators)

    monkeypatch.setattr(CPUModelRunner, "_sample", sample)
    monkeypatch.setattr(CPUModelRunner, "_bookkeeping_sync", keep_books)
    cpu_sampling.install()
    cpu_sampling.install()  # twice does no harm
    runner = object.__new__(CPUModelRunner)
    generators = {place: torch.Generator().manual_seed(7) for place in (0, 2)}
    runner.input_batch = SimpleNamespace(generators=generators)
    runner.discard_request_mask = SimpleNamespace(np=[True, False, False])
    first = runner._sample()
    assert runner._bookkeeping_sync() == [2]
    assert sorted(generators) == [0, 2]
    second = runner._sample()
    assert first[0] == first[1] == second[0] != second[1]


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM is not installed for a CPU")
def test_the_offset_is_what_a_cpus_generator_lacks() -> None:
    """Once it has one, `kv_transfer.cpu_sampling` can go."""
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()
