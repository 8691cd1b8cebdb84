"""The prefill deployment: engines that read prompts and hand their KV blocks over."""

from __future__ import annotations

from typing import Any

from kv_transfer.settings import EngineSettings
from kv_transfer.worker import EngineWorker


class PrefillWorker(EngineWorker):
    """A Ray Serve replica that owns one prefill engine."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__()
        await self.start(EngineSettings.model_validate(settings))
        await self.export_metrics()
