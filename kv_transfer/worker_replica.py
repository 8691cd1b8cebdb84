"""A worker as Ray Serve has it: the one class of both deployments. Its settings say which role the engine has."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import ray

from kv_transfer.gpu_memory import GpuMemory
from kv_transfer.load import NEEDED_TOKENS
from kv_transfer.serve_replica import prepare_replica
from kv_transfer.settings import EngineSettings
from kv_transfer.worker import EngineWorker
from kv_transfer.worker_endpoint import WorkerMetrics, counts_of

logger = logging.getLogger("baton.worker")


class WorkerReplica(EngineWorker):
    """A Ray Serve replica that owns one prefill or decode engine."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        prepare_replica()
        super().__init__()
        await self.start(_on_this_node(EngineSettings.model_validate(settings)))
        await self._export_metrics()

    def record_replica_metadata(self) -> dict[str, Any]:
        """What Ray Serve tells every front end about this replica: the engine's facts."""
        return self.engine.facts.to_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve's hook: how much of the KV here is needed, for who leaves when the pool shrinks."""
        return {NEEDED_TOKENS: self.needed_tokens()}

    def __del__(self) -> None:
        """Ray Serve's hook for a replica that goes."""
        self.shutdown()

    async def _export_metrics(self) -> None:
        """Serve this worker's own `/metrics`, beside its side channel; the facts tell the port."""
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        state = counts_of(self._state, asyncio.get_running_loop())
        self._metrics = metrics = WorkerMetrics(state, self._start_s, GpuMemory(gpus).read)
        self.engine.facts = replace(self.engine.facts, metrics_port=metrics.serve(self.engine.facts.kv_host))
        # A simulated engine makes its configuration up, which takes seconds: traffic need not wait for it.
        self._spawn(self._describe(metrics))

    async def _state(self) -> dict[str, int]:
        """What the engine and this worker have counted."""
        return {**await self.engine.call("state"), **self._counts}

    async def _describe(self, metrics: WorkerMetrics) -> None:
        try:
            metrics.describe_engine(await asyncio.to_thread(self.engine.vllm_config))
        except Exception as error:  # a metric is not worth a worker
            logger.warning("vLLM's metrics of the engine are not exported: %r", error)


def _on_this_node(settings: EngineSettings) -> EngineSettings:
    """`settings` whose transport has this Ray node's address where it is to be found out."""
    if settings.transport.host != "auto":
        return settings
    transport = settings.transport.model_copy(update={"host": ray.util.get_node_ip_address()})
    return settings.model_copy(update={"transport": transport})
