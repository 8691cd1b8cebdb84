"""The prefill deployment: engines that read prompts and hand their KV blocks over."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve

from kv_transfer.settings import EngineSettings
from kv_transfer.worker import EngineWorker

logger = logging.getLogger("baton.prefill")


class PrefillWorker(EngineWorker):
    """A Ray Serve replica that owns one prefill engine."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__()
        await self.start(EngineSettings.model_validate(settings))
        await self.export_metrics()

    async def release_elsewhere(self, handoffs: list[dict[str, Any]]) -> None:
        """Ask any decode worker: only a decode engine can tell a prefill engine that blocks are free."""
        decode = serve.get_deployment_handle("decode", serve.get_replica_context().app_name)
        logger.warning("%d handoffs of a front end that left are released", len(handoffs))
        await decode.release.remote(None, self._token, handoffs)
