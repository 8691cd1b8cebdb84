"""Baton in one process: real cluster, fleet, links, warmer, workers and simulated engines, without Ray.

What stands in for Ray Serve here only carries calls, slowly and unreliably, and replaces what was killed. So hundreds
of deaths take a minute, and a seed repeats them.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from kv_transfer.settings import EngineSettings, SimulatorSettings, TransportSettings
from kv_transfer.sim_text import fold, next_token
from kv_transfer.simulator import SimulatedEngine
from kv_transfer.worker import EngineWorker
from runtime import engine_board
from runtime.cache_view import CacheView
from runtime.cluster import Cluster
from runtime.limit_settings import LimitSettings
from runtime.placement import Placement
from runtime.policy.admission import AdmissionPolicy
from runtime.policy.types import PRESETS
from runtime.warmup import Warmer

VOCABULARY = 20_000
ROLES = ("prefill", "decode")
LEASE_S = 600
END = object()


def answer(prompt: list[int], tokens: int) -> list[int]:
    """What an undisturbed simulated engine says."""
    seed, made = fold(0, prompt), []
    for _ in range(tokens):
        made.append(next_token(seed, VOCABULARY))
        seed = fold(seed, made[-1:])
    return made


def bare_model(folder: Path) -> Path:
    """`folder` as the directory of a model without weights and tokenizer."""
    (folder / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}, "max_position_embeddings": 8192}}')
    return folder


class Died(Exception):
    """What a call to a killed worker ends with."""


class Worker(EngineWorker):
    """A worker whose process can be killed."""

    def __init__(self, fabric: Fabric) -> None:
        super().__init__()
        self.fabric = fabric
        self.killed = asyncio.Event()

    @property
    def simulated(self) -> SimulatedEngine:
        """The engine."""
        assert isinstance(self.engine, SimulatedEngine)
        return self.engine

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody, all connections break."""
        self.killed.set()
        self.shutdown()


class Call:
    """A method of a handle: `handle.method.remote(engine_id, …)`."""

    def __init__(self, handle: Handle, method: str) -> None:
        self._handle, self._method = handle, method

    def remote(self, engine_id: str | None, *args: Any) -> Any:
        """Start the call."""
        if self._handle.stream:
            return Stream(self._handle, self._method, engine_id, args)
        return self._call(engine_id, *args)

    async def _call(self, engine_id: str | None, *args: Any) -> Any:
        if len(args) > 1 and self._handle.fabric.is_silent(str(args[1])):
            raise Died("the caller is dead")
        worker = await self._handle.reach(engine_id)
        if self._method == "exchange" and self._handle.deployment_name == self._handle.fabric.swallows:
            await asyncio.Event().wait()
        work = asyncio.ensure_future(getattr(worker, self._method)(engine_id, *args))
        death = asyncio.ensure_future(worker.killed.wait())
        await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if worker.killed.is_set():
            work.cancel()
            raise Died(self._method)
        return await work


class Stream:
    """A streaming call, under way once it is made. Read in another loop than the one that the workers live in."""

    def __init__(self, handle: Handle, method: str, engine_id: str | None, args: tuple[Any, ...]) -> None:
        self._home = handle.fabric.loop
        self._handle, self._method, self._engine_id, self._args = handle, method, engine_id, args
        self._task: asyncio.Task[None] | None = None
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        loop, put = asyncio.get_running_loop(), self._items.put_nowait
        self._home.call_soon_threadsafe(self._begin, lambda item: loop.call_soon_threadsafe(put, item))

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Items until the stream ends or the worker dies."""
        while True:
            kind, value = await self._items.get()
            if kind == "item":
                yield value
            elif kind == "end":
                return
            else:
                raise value

    def _begin(self, put: Callable[[Any], object]) -> None:
        self._task = asyncio.ensure_future(self._pump(put))

    async def _pump(self, put: Callable[[Any], object]) -> None:
        with suppress(RuntimeError):  # the reader's loop is closed
            try:
                worker = await self._handle.reach(self._engine_id)
                async for item in self._until_death(worker):
                    put(("item", item))
                put(("end", None))
            except Died as error:
                put(("error", error))

    async def _until_death(self, worker: Worker) -> AsyncIterator[Any]:
        death = asyncio.ensure_future(worker.killed.wait())
        generator = getattr(worker, self._method)(self._engine_id, *self._args)
        step: asyncio.Future[Any] = asyncio.ensure_future(asyncio.sleep(0))
        try:
            while True:
                step = asyncio.ensure_future(anext(generator, END))
                await asyncio.wait({step, death}, return_when=asyncio.FIRST_COMPLETED)
                if worker.killed.is_set():
                    step.cancel()
                    raise Died(self._method)
                await self._handle.fabric.delay()
                if (item := step.result()) is END:
                    return
                yield item
        except asyncio.CancelledError:
            step.cancel()
            await asyncio.wait({step})
            await generator.aclose()
            raise
        finally:
            death.cancel()

    def cancel(self) -> None:
        """Ray's way to give up a stream: the worker's generator is closed."""
        self._home.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if self._task is not None and not self._handle.fabric.is_silent(self._args[1]):
            self._task.cancel()


class Handle:
    """A deployment handle."""

    def __init__(self, fabric: Fabric, role: str, stream: bool = False) -> None:
        self.fabric, self.deployment_name, self.stream = fabric, role, stream

    def options(self, *, stream: bool) -> Handle:
        """As Ray Serve's."""
        return Handle(self.fabric, self.deployment_name, stream)

    def __getattr__(self, method: str) -> Call:
        return Call(self, method)

    async def reach(self, engine_id: str | None) -> Worker:
        """The worker that a call is for, after a while; a message may get lost, which breaks the call."""
        await self.fabric.delay()
        if self.fabric.loses_message():
            raise Died("the message was lost")
        for worker in self.fabric.pools[self.deployment_name]:
            if engine_id in (None, worker.engine.facts.engine_id):
                return worker
        raise Died("no such engine")


class Fabric:
    """Both pools; kills are replaced after a moment, as by Ray Serve.

    Args:
        model: directory of a model, of which the simulator needs only `config.json`.
        application: under which the engines are announced; by default a fresh name.
    """

    SIMULATOR: ClassVar[dict[str, Any]] = {
        "prefill_tokens_per_s": 200_000,
        "step_base_s": 0.001,
        "step_per_request_s": 0.00001,
        "num_blocks": 4096,
    }

    def __init__(
        self,
        model: Path,
        seed: int,
        workers: int,
        hang_s: float = 1.0,
        application: str = "",
        window_tokens: int = 8192,
        pull_timeout_s: float = 60.0,
        token: str = "the token of the tests",
        **simulator: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.application = application or uuid.uuid4().hex
        self.token = token
        self.pools: dict[str, list[Worker]] = {role: [] for role in ROLES}
        self.kills = 0
        self.silent: set[str] = set()
        self.loss_rate = 0.0
        self.swallows: str | None = None  # role whose workers get no commands
        self.longest_delay_s = 0.002
        self._workers = workers
        self._settings = {
            role: EngineSettings(
                role=role,  # type: ignore[arg-type]
                kind="simulated",
                model=str(model),
                args={"max_model_len": window_tokens},
                hang_s=hang_s,
                pull_timeout_s=pull_timeout_s,
                token=self.token,
                transport=TransportSettings(host="127.0.0.1", lease_s=LEASE_S),  # type: ignore[call-arg]
                simulator=SimulatorSettings(**{**self.SIMULATOR, **simulator}),
            )
            for role in ROLES
        }
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start both pools."""
        self.loop = asyncio.get_running_loop()
        for role in ROLES:
            for _ in range(self._workers):
                await self.add(role)

    async def add(self, role: str) -> None:
        """Start one worker."""
        worker = Worker(self)
        try:
            await worker.start(self._settings[role])
        except BaseException:
            worker.shutdown()
            raise
        self.pools[role].append(worker)
        self.announce(role)

    def any(self, role: str) -> Worker:
        """Some worker of a role."""
        return self.random.choice(self.pools[role])

    def kill(self, worker: Worker, replace_after_s: float = 0.05) -> None:
        """SIGKILL, and a replacement after a while."""
        role = worker.engine.facts.role
        if worker not in self.pools[role]:
            return
        self.kills += 1
        worker.kill()
        self.pools[role].remove(worker)
        self.announce(role)
        self._spawn(self._replace(role, replace_after_s))

    def drain(self, worker: Worker) -> None:
        """What Ray Serve does to scale down: the worker is no longer announced, and lives on for now."""
        role = worker.engine.facts.role
        engines = [other.engine.facts.to_dict() for other in self.pools[role] if other is not worker]
        engine_board.publish(self.application, role, engines)

    async def watch_health(self) -> None:
        """Ray Serve's health checks: kill and replace what says that it is dead."""
        while True:
            await asyncio.sleep(0.05)
            for worker in [worker for pool in self.pools.values() for worker in pool]:
                try:
                    worker.check_health()
                except Exception:
                    self.kill(worker)

    async def delay(self) -> None:
        """The time that a message takes."""
        await asyncio.sleep(self.random.uniform(0, self.longest_delay_s))

    def loses_message(self) -> bool:
        """Whether this message gets lost."""
        return self.random.random() < self.loss_rate

    def is_silent(self, link: str) -> bool:
        """Whether a link belongs to a front end that was killed."""
        return any(link.startswith(name) for name in self.silent)

    def blocks_held(self) -> int:
        """KV blocks that any engine holds."""
        return sum(worker.simulated.state()["blocks_held"] for pool in self.pools.values() for worker in pool)

    def leases_expired(self) -> int:
        """Leases that ran out on any living engine."""
        return sum(worker.simulated.leases_expired for pool in self.pools.values() for worker in pool)

    async def settle(self) -> None:
        """Let the workers notice that a front end has left."""
        while any(worker._peers for pool in self.pools.values() for worker in pool):
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Stop everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in [worker for pool in self.pools.values() for worker in pool]:
            worker.shutdown()

    def spawn_health(self) -> None:
        """Begin to watch the workers' health."""
        self._spawn(self.watch_health())

    async def _replace(self, role: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.add(role)

    def announce(self, role: str) -> None:
        """Ray Serve's news: who is there."""
        engine_board.publish(self.application, role, [w.engine.facts.to_dict() for w in self.pools[role]])

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class FrontEnd:
    """A front end without HTTP: the cluster, and a queue for each request."""

    def __init__(
        self,
        fabric: Fabric,
        admission: AdmissionPolicy | None = None,
        preset: str = "always-disaggregated",
        **limits: Any,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.fabric = fabric
        placement = Placement(PRESETS[preset], CacheView(100_000))
        self.cluster = Cluster(LimitSettings(**limits), placement, admission)
        handles: Any = {role: Handle(fabric, role) for role in ROLES}
        self.cluster.connect(self.name, handles, fabric.token)
        self.warmer = Warmer(self, self.cluster)  # type: ignore[arg-type]
        self._queues: dict[str, asyncio.Queue[tuple[list[int], str | None]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Follow the fabric until both pools are warm."""
        self._reader = asyncio.ensure_future(self._read())
        self.cluster.fleet.follow(self.fabric.application)
        self.cluster.placement.cache.follow(self.fabric.application, ROLES)
        self.warmer.start()
        await asyncio.wait_for(self.warmer.both_pools(), 30)

    async def _read(self) -> None:
        while True:
            for output in (await self.cluster.get_output_async()).outputs:
                reason = None if output.finish_reason is None else str(output.finish_reason)
                queue = self._queues.get(output.request_id)
                assert queue is not None, f"output for {output.request_id}, which nobody waits for"
                queue.put_nowait((output.new_token_ids, reason))

    async def stream(self, request_id: str, prompt: list[int], params: SamplingParams) -> AsyncIterator[list[int]]:
        """Tokens as they come. Leaving early is a disconnect."""
        internal = f"{request_id}-{uuid.uuid4().hex[:8]}"
        queue = self._queues[internal] = asyncio.Queue()
        request = EngineCoreRequest(
            request_id=internal,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=request_id,
        )
        await self.cluster.add_request_async(request)
        finished = None
        try:
            while finished is None:
                tokens, finished = await queue.get()
                for token in tokens:  # one by one, so that nobody misses the token that they wait for
                    yield [token]
            if finished == "error":
                raise RuntimeError(f"{request_id} ended with an error")
            await asyncio.sleep(0)
            assert queue.empty(), f"{request_id} goes on after its end"
        finally:
            if finished is None:
                await self.cluster.abort_requests_async([internal])
                await asyncio.sleep(0)
            else:
                self._queues.pop(internal)

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        """What the warmer asks of vLLM's front end."""
        tokens = [token async for part in self.stream(request_id, prompt["prompt_token_ids"], params) for token in part]
        output = CompletionOutput(0, "", tokens, None, None, finish_reason="length")
        yield RequestOutput(request_id, None, None, None, [output], True)

    def die(self) -> None:
        """SIGKILL: it says nothing any more, and its streams stay open as Ray leaves them."""
        self.fabric.silent.add(self.name)
        self.warmer.stop()
        if self._reader is not None:
            self._reader.cancel()
        self.cluster.shutdown()

    async def close(self) -> None:
        """Leave in order."""
        self.warmer.stop()
        self.cluster.shutdown()
        if self._reader is not None:
            self._reader.cancel()


@asynccontextmanager
async def fabrics() -> AsyncIterator[Callable[..., Awaitable[tuple[Fabric, FrontEnd]]]]:
    """Starts fabrics, each with a front end, and closes all of them at the end."""
    made: list[Any] = []

    async def start(fabric: Fabric, *args: Any, **limits: Any) -> tuple[Fabric, FrontEnd]:
        await fabric.start()
        fabric.spawn_health()
        front_end = FrontEnd(fabric, *args, **limits)
        made.extend((front_end, fabric))
        await front_end.start()
        return fabric, front_end

    yield start
    for thing in made:
        await thing.close()
