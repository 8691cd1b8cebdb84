"""What vLLM's front end asks of its engine core as a whole, and so of every worker: adapters, and caches to empty."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.v1.engine.core_client import EngineCoreClient

from runtime.fleet import Fleet


class EveryWorker(EngineCoreClient):
    """The calls of vLLM's `EngineCoreClient` that go to all workers of a fleet alike."""

    fleet: Fleet

    async def add_lora_async(self, lora_request: Any) -> bool:
        """Load an adapter on every worker."""
        return all(await self._broadcast("add_lora", lora_request))

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
        """Empty every worker's prefix cache; False while any block is held."""
        return all(await self._broadcast("reset_prefix_cache", reset_running_requests, reset_connector))

    async def reset_mm_cache_async(self) -> None:
        """Empty every worker's multimodal cache."""
        await self._broadcast("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        """Empty every worker's encoder cache."""
        await self._broadcast("reset_encoder_cache")

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(link.call(method, *args) for link in self.fleet.links())))
