"""The decode deployment: engines that pull KV blocks and write answers."""

from __future__ import annotations

from typing import Any

from decode.request import release_leg
from kv_transfer.handoff import Handoff
from kv_transfer.settings import EngineSettings
from kv_transfer.worker import EngineWorker


class DecodeWorker(EngineWorker):
    """A Ray Serve replica that owns one decode engine."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__()
        await self.start(EngineSettings.model_validate(settings))
        await self.export_metrics()

    async def release(self, engine_id: str | None, token: str, handoffs: list[dict[str, Any]]) -> None:
        """Release handoffs for a prefill worker whose front end died; `None` means any decode worker."""
        self._check(engine_id, token)
        for params in handoffs:
            handoff = Handoff.from_params(params)
            await self.engine.add(release_leg(handoff, f"{handoff.leg_id}-orphan"))
