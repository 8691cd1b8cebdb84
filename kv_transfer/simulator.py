"""A simulated engine core with real roles: queues, steps, KV blocks, handoffs and faults, but no model.

For tests and planning. It stands behind the same interface as a real engine (`kv_transfer.engine.Engine`) and speaks
the same records. Its text is a pure function of the tokens before, so that a stream that is continued elsewhere from
prompt and answer goes on identically. Grammars are not followed: structured output gets ordinary tokens.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

from kv_transfer.engine import EngineDied, EngineError, EngineFacts
from kv_transfer.events import BlockRemoved
from kv_transfer.handoff import kv_params
from kv_transfer.settings import EngineSettings
from kv_transfer.sim_cache import BlockCache, BlockKey
from kv_transfer.sim_events import EventPublisher, runs
from kv_transfer.sim_faults import Faults
from kv_transfer.sim_handoffs import SimHandoffs
from kv_transfer.sim_request import SimRequest


class SimulatedEngine:
    """An engine core of one role, in this process and event loop."""

    def __init__(self, settings: EngineSettings) -> None:
        shape = json.loads((Path(settings.model) / "config.json").read_text())
        self._settings = settings
        self._sim = settings.simulator
        self._vocab = int(shape["vocab_size"])
        self._window = int(settings.args.get("max_model_len") or shape["max_position_embeddings"])
        self._cache = BlockCache(self._sim.num_blocks, self._removed)
        self._events = EventPublisher()
        self._waiting: deque[SimRequest] = deque()
        self._running: list[SimRequest] = []
        self._fetching: set[SimRequest] = set()
        self._outputs: asyncio.Queue[EngineCoreOutputs | None] = asyncio.Queue()
        self._work = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._engine_id = uuid.uuid4().hex
        self.faults = Faults()
        lease_s = settings.transport.lease_s
        self._handoffs = SimHandoffs(self._engine_id, lease_s, self._sim, self.faults, self._drop)
        self.prompt_tokens_computed = 0
        self.facts: EngineFacts

    @classmethod
    async def start(cls, settings: EngineSettings) -> SimulatedEngine:
        """Start an engine; it listens for pulls on the transport's host."""
        engine = cls(settings)
        try:
            await engine._start()
        except BaseException:
            engine.shutdown()
            raise
        return engine

    async def _start(self) -> None:
        settings = self._settings
        host = "127.0.0.1" if settings.transport.host == "auto" else settings.transport.host
        if settings.events:
            self._events.start(host)
        self.facts = EngineFacts(
            engine_id=self._engine_id,
            role=settings.role,
            model=settings.model,
            dtype=str(settings.args.get("dtype", "auto")),
            cache_dtype=str(settings.args.get("kv_cache_dtype", "auto")),
            block_tokens=self._sim.block_tokens,
            tensor_parallel=int(settings.args.get("tensor_parallel_size", 1)),
            max_model_len=self._window,
            num_blocks=self._sim.num_blocks,
            kv_host=host,
            kv_port=await self._handoffs.start(host),
            max_streams=self._sim.max_batch_requests,
            max_step_tokens=self._sim.max_step_tokens,
            events=self._events.endpoint,
            events_replay=self._events.replay_endpoint,
        )
        self._spawn(self._run())

    # The engine's interface

    async def add(self, request: EngineCoreRequest) -> None:
        """See `Engine.add`."""
        if request.abort_immediately:
            self._handoffs.settle_own(kv_params(request))
            return
        self._waiting.append(SimRequest.of(request, self._sim.block_tokens))
        self._work.set()

    async def abort(self, request_ids: list[str]) -> None:
        """See `Engine.abort`."""
        wanted = set(request_ids)
        for entry in [*self._waiting, *self._running, *self._fetching]:
            if entry.id in wanted:
                unpulled = entry.is_pull and entry not in self._running
                self._drop(entry)
                if unpulled:
                    self._spawn(self._handoffs.decline(entry))

    async def outputs(self) -> EngineCoreOutputs:
        """See `Engine.outputs`."""
        outputs = None if self.faults.dead else await self._outputs.get()
        if outputs is None:
            raise EngineDied("the simulated engine core died")
        return outputs

    async def call(self, method: str, *args: Any) -> Any:
        """See `Engine.call`; also `state` and `inject_fault(name, value)`."""
        if method == "reset_prefix_cache":
            return self._cache.clear()
        if method == "state":
            return self.state()
        if method == "inject_fault":
            return self._inject(*args)
        if method in ("reset_mm_cache", "reset_encoder_cache"):
            return None
        if method == "list_loras":
            return set()
        raise EngineError(f"the simulated engine has no {method}")

    def state(self) -> dict[str, int]:
        """Counts of what is in the engine and what it has done."""
        return {
            "waiting": len(self._waiting),
            "running": len(self._running),
            "fetching": len(self._fetching),
            "blocks_held": self._cache.held,
            "handoffs": len(self._handoffs),
            "leases_expired": self._handoffs.leases_expired,
            "pulls": self._handoffs.pulls,
            "pulled_bytes": self._handoffs.pulled_bytes,
            "prompt_tokens_computed": self.prompt_tokens_computed,
        }

    def vllm_config(self) -> Any:
        """See `Engine.vllm_config`: built on this machine's platform, without an engine."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        config = AsyncEngineArgs(model=self._settings.model, **self._settings.args).create_engine_config()
        config.cache_config.block_size = self._sim.block_tokens
        return config

    def shutdown(self) -> None:
        """See `Engine.shutdown`."""
        self._handoffs.close()
        self._events.close()
        for task in self._background:
            task.cancel()

    # Steps

    async def _run(self) -> None:
        """Admit, step, repeat; sleep when there is nothing to do."""
        while not self.faults.dead:
            self._admit()
            if not self._running or self.faults.hang:
                self._work.clear()
                await self._work.wait()
                continue
            readers = self._readers()
            prompt_tokens = sum(tokens for _, tokens in readers)
            writers = sum(entry.is_read for entry in self._running)
            seconds = 0.0 if self._sim.zero_time else self._step_s(prompt_tokens) * self.faults.slow
            await asyncio.sleep(seconds)
            outputs = self._step(readers)
            if not self.faults.dead:
                self._emit(outputs, self._stats(prompt_tokens, writers, seconds))

    def _admit(self) -> None:
        """Move waiting requests to the batch while there are places and blocks; pulls start here."""
        while self._waiting and len(self._running) + len(self._fetching) < self._sim.max_batch_requests:
            entry = self._waiting[0]
            cached = min(self._cache.hits(entry.keys) * self._sim.block_tokens, max(0, len(entry.prompt) - 1))
            held = entry.blocks(self._sim.block_tokens, self._window)
            if len(held) > self._cache.capacity or self.faults.fail_legs > 0:
                self.faults.fail_legs = max(0, self.faults.fail_legs - 1)
                self._waiting.popleft()  # it will never fit
                self._emit([entry.error()])
                continue
            if not self._cache.hold(held):
                return
            self._waiting.popleft()
            entry.held, entry.cached, entry.read = held, cached, cached
            if entry.is_pull:
                self._fetching.add(entry)
                entry.fetch = self._spawn(self._pull(entry))
            else:
                self._running.append(entry)

    def _readers(self) -> list[tuple[SimRequest, int]]:
        """Which requests read how many prompt tokens in this step (chunked prefill, first come first served)."""
        budget, readers = self._sim.max_step_tokens, []
        for entry in self._running:
            rest = min(len(entry.prompt) - entry.read, budget)
            if rest > 0:
                readers.append((entry, rest))
                budget -= rest
        return readers

    def _step_s(self, prompt_tokens: int) -> float:
        kv_tokens = sum(entry.read + entry.made for entry in self._running)
        return (
            self._sim.step_base_s
            + self._sim.step_per_request_s * len(self._running)
            + self._sim.step_per_kv_token_s * kv_tokens
            + prompt_tokens / self._sim.prefill_tokens_per_s
        )

    def _step(self, readers: list[tuple[SimRequest, int]]) -> list[EngineCoreOutput]:
        for entry, tokens in readers:
            if entry in self._running:  # and was not aborted during the step
                self._read(entry, tokens)
        writers = [entry for entry in self._running if entry.is_read]
        return [self._write(entry) for entry in writers]

    def _read(self, entry: SimRequest, tokens: int) -> None:
        """Note that the KV of the next prompt tokens is here."""
        block = self._sim.block_tokens
        before, entry.read = entry.read, entry.read + tokens
        if stored := self._cache.fill(entry.keys[before // block : entry.read // block]):
            lora = entry.request.lora_request
            name, salt = lora.lora_name if lora else None, entry.request.cache_salt
            self._events.tell(runs(entry.keys, set(stored), entry.prompt, block, name, salt))

    def _removed(self, keys: Sequence[BlockKey]) -> None:
        """Tell of blocks that can be hit no more; only those with content of a prompt ever could."""
        self._events.tell([BlockRemoved([key for key in keys if isinstance(key, int)], "GPU")])

    def _write(self, entry: SimRequest) -> EngineCoreOutput:
        """The next token of a request, which leaves with the last one."""
        output = entry.write(self._vocab, self._window)
        if output.prefill_stats is not None:
            self.prompt_tokens_computed += output.prefill_stats.num_computed_tokens
        if output.finished and entry.hands_over:
            self._running.remove(entry)
            output.kv_transfer_params = self._handoffs.pin(entry)
        elif output.finished:
            self._drop(entry)
        return output

    def _drop(self, entry: SimRequest) -> None:
        """Take a request out of wherever it is and free its blocks."""
        if entry in self._waiting:
            self._waiting.remove(entry)
        if entry in self._running:
            self._running.remove(entry)
        self._fetching.discard(entry)
        if entry.fetch is not None and entry.fetch is not asyncio.current_task():
            entry.fetch.cancel()
        self._cache.release(entry.held)
        entry.held = []
        self._work.set()

    def _emit(self, outputs: list[EngineCoreOutput], stats: SchedulerStats | None = None) -> None:
        self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs, scheduler_stats=stats))

    def _stats(self, prompt_tokens: int, writers: int, seconds: float) -> SchedulerStats:
        """What vLLM tells of each step, as far as anybody here reads it."""
        details = SchedulerIterationDetails(0, int(prompt_tokens > 0), prompt_tokens, writers, writers, seconds * 1000)
        return SchedulerStats(
            num_running_reqs=len(self._running),
            num_waiting_reqs=len(self._waiting) + len(self._fetching),
            kv_cache_usage=self._cache.held / self._cache.capacity,
            iteration_details=details,
        )

    async def _pull(self, entry: SimRequest) -> None:
        """Have a request's blocks fetched; it runs once they are here."""
        if not await self._handoffs.pull(entry):
            self._drop(entry)
            self._emit([entry.error()])
            return
        self._read(entry, entry.pulled)
        self._fetching.discard(entry)
        self._running.append(entry)
        self._work.set()

    # Faults

    def _inject(self, name: str, value: Any) -> None:
        self.faults.inject(name, value)
        if self.faults.dead:
            self.shutdown()
            self._outputs.put_nowait(None)
        self._work.set()

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
