"""What vLLM's front end asks of its engine core as a whole, and so of every worker: adapters, and caches to empty.

A worker that joins later has no adapters. It needs none: each leg carries its own (`lora_request`), and vLLM's engine
loads what it does not have before it runs the leg. Adapters' ids are those of `runtime.adapters`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import EngineCoreClient

from runtime.adapters import numbered
from runtime.errors import Refusal
from runtime.fleet import Fleet


class EveryWorker(EngineCoreClient):
    """The calls of vLLM's `EngineCoreClient` that go to all workers of a fleet alike."""

    fleet: Fleet

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on every worker, which is how vLLM learns whether it can be loaded at all.

        Raises:
            Refusal: there is no worker to try it on; vLLM does not look at the answer.
        """
        answers = await self._broadcast("add_lora", numbered(lora_request))
        if not answers:
            raise Refusal("no_workers", "There is no worker that could load the adapter.")
        return all(answers)

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter on every worker."""
        return all(await self._broadcast("remove_lora", lora_id))

    async def list_loras_async(self) -> set[int]:
        """Adapters that every worker has."""
        loras: list[set[int]] = [set(answer) for answer in await self._broadcast("list_loras")]
        return set.intersection(*loras) if loras else set()

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Pin an adapter on every worker."""
        return all(await self._broadcast("pin_lora", lora_id))

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty every worker's prefix cache; False while any block is held, or a worker is not ready to be asked."""
        answers = await self._broadcast("reset_prefix_cache", reset_running_requests, reset_connector)
        return 0 < len(answers) == len(self.fleet.workers) and all(answers)

    async def reset_mm_cache_async(self) -> None:
        """Empty every worker's multimodal cache."""
        await self._broadcast("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        """Empty every worker's encoder cache."""
        await self._broadcast("reset_encoder_cache")

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(link.call(method, *args) for link in self.fleet.links())))
