"""What is asked of all workers alike is true only of workers that were asked."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.sampling_params import SamplingParams

from decode.request import decode_leg
from prefill.request import prefill_leg
from runtime.errors import Refusal
from runtime.every_worker import EveryWorker
from runtime.live_request import trusted
from tests.unit.test_resume import engine_request


class Fleet:
    """Workers that answer so; None: one that is not ready to be asked."""

    def __init__(self, answers: list[bool | None]) -> None:
        self.workers = answers
        self.asked: list[tuple[Any, ...]] = []

    def links(self) -> list[Any]:
        """Those that are ready."""
        return [SimpleNamespace(call=self._call(answer)) for answer in self.workers if answer is not None]

    def _call(self, answer: bool) -> Any:
        async def call(method: str, *args: Any) -> bool:
            self.asked.append((method, *args))
            return answer

        return call


class Client(EveryWorker):
    """The part of the cluster that asks everybody."""

    def __init__(self, answers: list[bool | None]) -> None:
        self.fleet = Fleet(answers)  # type: ignore[assignment]

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to stop."""


@pytest.mark.parametrize(
    ("answers", "emptied"),
    [([], False), ([True, True], True), ([True, False], False), ([True, None], False), ([None], False)],
)
async def test_caches_are_empty_only_where_they_were_emptied(answers: list[bool | None], emptied: bool) -> None:
    """A worker that is set aside, or drains, may come back with its cache."""
    assert await Client(answers).reset_prefix_cache_async() is emptied


async def test_an_adapter_needs_a_worker_to_be_tried_on() -> None:
    """Whatever did not fail to load, vLLM offers to clients."""
    adapter = LoRARequest("fr", 1, "/adapters/fr")
    assert await Client([True, None]).add_lora_async(adapter)
    with pytest.raises(Refusal, match="no worker"):
        await Client([None]).add_lora_async(adapter)


async def test_front_ends_mean_the_same_adapter_by_the_same_number() -> None:
    """Each of vLLM's counts its own from 1, and an engine loads nothing for a number that it has."""
    client = Client([True])
    first, second = LoRARequest("fr", 1, "/adapters/fr"), LoRARequest("de", 1, "/adapters/de")
    for adapter in (first, second):
        await client.add_lora_async(adapter)
    loaded: list[LoRARequest] = [args[0] for _, *args in client.fleet.asked]  # type: ignore[attr-defined]
    assert [adapter.lora_name for adapter in loaded] == ["fr", "de"]
    assert loaded[0].lora_int_id != loaded[1].lora_int_id
    other = trusted(engine_request(SamplingParams(), lora_request=LoRARequest("fr", 7, "/adapters/fr")))
    assert other.lora_request is not None
    assert other.lora_request.lora_int_id == loaded[0].lora_int_id > 0


def test_a_worker_that_joins_later_loads_adapters_with_the_legs() -> None:
    """Both legs carry it, and vLLM loads what an engine does not have before a step."""
    request = engine_request(SamplingParams(), lora_request=LoRARequest("fr", 1, "/adapters/fr"))
    assert prefill_leg(request, "p").lora_request == decode_leg(request, "d", None).lora_request == request.lora_request
    assert "self.add_adapter(" in inspect.getsource(LRUCacheWorkerLoRAManager._apply_adapters)
