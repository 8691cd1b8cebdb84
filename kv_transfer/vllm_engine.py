"""A real vLLM engine core in its own process: start, submit, step outputs, abort.

The one place that drives vLLM's `EngineCoreClient` from the worker's side. It is internal API of vLLM 0.32:
`tests/unit/test_contract.py` fails loudly when an upgrade moves something.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kv_transfer.cores import BIND_ENV, claim_cores
from kv_transfer.engine import EngineDied, EngineFacts, EngineStartFailed
from kv_transfer.engine_process import WATCH_ENV
from kv_transfer.nixl import free_port, transfer_config, transport_env
from kv_transfer.settings import EngineSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core_client import AsyncMPClient


NIXL_COUNTS = {
    "bytes_transferred": "pulled_bytes",
    "num_failed_transfers": "failed_transfers",
    "num_failed_handshakes": "failed_handshakes",
    "num_kv_expired_reqs": "leases_expired",
}
"""The connector's statistics (lists of values since the last step) and the names of their sums here."""


EVENTS = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"}
"""vLLM's `KVEventsConfig`: free ports of the transport's host, which vLLM takes from `VLLM_HOST_IP`."""


class VllmEngine:
    """One vLLM engine core with the NIXL connector of its role."""

    def __init__(self, client: AsyncMPClient, config: VllmConfig, facts: EngineFacts) -> None:
        self.facts = facts
        self._client = client
        self._config = config
        self._counts: Counter[str] = Counter()

    @classmethod
    async def start(cls, settings: EngineSettings) -> VllmEngine:
        """Start the core's processes and wait until they can take requests (tens of seconds).

        Raises:
            EngineStartFailed: with the reason; the core of one that took too long ends with this process.
        """
        host = settings.transport.host
        port = free_port(host)
        _set_environment(settings, host, port)
        try:
            async with asyncio.timeout(settings.start_timeout_s) as limit:
                return await asyncio.to_thread(cls._start_blocking, settings, host, port)
        except Exception as error:
            why = f"not within {settings.start_timeout_s:g} s" if limit.expired() else error
            raise EngineStartFailed(f"the {settings.role} engine did not start: {why}") from error

    @classmethod
    def _start_blocking(cls, settings: EngineSettings, host: str, port: int) -> VllmEngine:
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor import Executor

        config = build_vllm_config(settings)
        client = EngineCoreClient.make_async_mp_client(config, Executor.get_class(config), log_stats=True)
        events = client.get_kv_event_sources().get(0)
        facts = replace(
            _facts(settings, config, host, port),
            events=str(events.endpoint) if events else "",
            events_replay=str(events.replay_endpoint or "") if events else "",
        )
        return cls(client, config, facts)

    async def add(self, request: EngineCoreRequest) -> None:
        """See `Engine.add`."""
        await self._client.add_request_async(request)

    async def abort(self, request_ids: list[str]) -> None:
        """See `Engine.abort`."""
        await self._client.abort_requests_async(request_ids)

    async def outputs(self) -> EngineCoreOutputs:
        """See `Engine.outputs`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outputs = await self._client.get_output_async()
        except EngineDeadError as error:
            raise EngineDied(f"the {self.facts.role} engine core died") from error
        self._count(outputs)
        return outputs

    def _count(self, outputs: EngineCoreOutputs) -> None:
        counts = self._counts
        for output in outputs.outputs:
            if (read := output.prefill_stats) is not None:
                # vLLM's figures say 0 computed when all of a prompt was pulled, but it runs the last token again.
                computed = max(1, read.num_computed_tokens)
                counts["prompt_tokens_computed"] += computed
                counts["prompt_tokens_pulled"] += read.num_prompt_tokens - read.num_local_cached_tokens - computed
                counts["prompt_tokens_cached"] += read.num_local_cached_tokens
        stats = outputs.scheduler_stats
        if stats is None:
            return
        counts["running"], counts["waiting"] = stats.num_running_reqs, stats.num_waiting_reqs
        counts["fetching"] = stats.num_kv_fetch_reqs_by_stage.get("in_progress", 0)
        for name, values in (stats.kv_connector_stats or {}).items():
            if name in NIXL_COUNTS:
                counts[NIXL_COUNTS[name]] += int(sum(values))
                counts["pulls"] += len(values) if name == "bytes_transferred" else 0

    async def call(self, method: str, *args: Any) -> Any:
        """See `Engine.call`; also `state`, the counts of what this engine has done."""
        if method == "state":
            return dict(self._counts)
        return await getattr(self._client, f"{method}_async")(*args)

    def vllm_config(self) -> VllmConfig:
        """See `Engine.vllm_config`."""
        return self._config

    def shutdown(self) -> None:
        """See `Engine.shutdown`."""
        self._client.shutdown(timeout=0)


def build_vllm_config(settings: EngineSettings) -> VllmConfig:
    """The `VllmConfig` of an engine, with its connector. Needs the engine's platform (a GPU engine needs a GPU)."""
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = engine_args(settings)
    args["kv_transfer_config"] = KVTransferConfig(**args["kv_transfer_config"])
    if "kv_events_config" in args:
        args["kv_events_config"] = KVEventsConfig(**args["kv_events_config"])
    return AsyncEngineArgs(**args).create_engine_config()


def engine_args(settings: EngineSettings) -> dict[str, Any]:
    """All `AsyncEngineArgs` of an engine, as `baton check` prints them."""
    own = {"kv_transfer_config": transfer_config(settings), "enable_logging_iteration_details": True}  # for `Meter`
    if settings.events:
        own["kv_events_config"] = dict(EVENTS)
    return {"model": settings.model, **settings.args, **own}


def _set_environment(settings: EngineSettings, host: str, port: int) -> None:
    """Set what the engine's processes inherit. A replica owns one engine, so the process is ours to change."""
    os.environ.update(transport_env(settings.transport, host, port))
    os.environ["VLLM_HOST_IP"] = host
    # The replica has threads and an event loop by now: a forked engine core could deadlock.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ[WATCH_ENV] = str(os.getpid())
    os.environ.update(settings.env)
    os.environ.update(_binding(settings))


def _binding(settings: EngineSettings) -> dict[str, str]:
    """Environment that binds each model worker's threads to cores that no other engine of this machine has."""
    ranks = int(settings.args.get("tensor_parallel_size", 1)) * int(settings.args.get("pipeline_parallel_size", 1))
    each = settings.pinned_threads
    chosen = settings.env.get(BIND_ENV, "nobind") != "nobind"  # by the user
    if not each or chosen or not (cores := claim_cores(each * ranks)):
        return {}
    lists = (cores[rank * each : (rank + 1) * each] for rank in range(ranks))
    return {BIND_ENV: "|".join(",".join(map(str, part)) for part in lists)}


def _facts(settings: EngineSettings, config: VllmConfig, host: str, port: int) -> EngineFacts:
    assert config.kv_transfer_config is not None  # transfer_config() always gives one
    return EngineFacts(
        engine_id=str(config.kv_transfer_config.engine_id),
        role=settings.role,
        model=settings.model,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        cache_dtype=str(config.cache_config.cache_dtype),
        block_tokens=int(config.cache_config.block_size),
        tensor_parallel=int(config.parallel_config.tensor_parallel_size),
        max_model_len=int(config.model_config.max_model_len),
        num_blocks=int(config.cache_config.num_gpu_blocks or 0),
        kv_host=host,
        kv_port=port,
        max_streams=int(config.scheduler_config.max_num_seqs),
        max_step_tokens=int(config.scheduler_config.max_num_batched_tokens),
    )
