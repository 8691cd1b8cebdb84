"""Both pools in one process, without Ray: real workers and simulated engines, which are killed and replaced.

`front_end.py` is what serves over them. What stands in for Ray Serve between the two (`handles.py`) only carries calls,
slowly and unreliably. So hundreds of deaths take a minute, and a seed repeats them.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from pathlib import Path
from typing import Any, ClassVar

from kv_transfer.settings import EngineSettings, SimulatorSettings, TransportSettings
from kv_transfer.simulator import SimulatedEngine
from kv_transfer.worker import EngineWorker
from runtime import engine_board

ROLES = ("prefill", "decode")
LEASE_S = 600


class Worker(EngineWorker):
    """A worker whose process can be killed."""

    def __init__(self) -> None:
        super().__init__()
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
        self._pool_size = workers
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
            for _ in range(self._pool_size):
                await self.add(role)

    async def add(self, role: str) -> None:
        """Start one worker."""
        worker = Worker()
        try:
            await worker.start(self._settings[role])
        except BaseException:
            worker.shutdown()
            raise
        self.pools[role].append(worker)
        self.announce(role)

    def workers(self) -> list[Worker]:
        """The workers of both pools."""
        return [worker for pool in self.pools.values() for worker in pool]

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
        self.announce(worker.engine.facts.role, without=worker)

    def announce(self, role: str, without: Worker | None = None) -> None:
        """Ray Serve's news: who is there; all of the pool but one that is to go."""
        engines = [worker.engine.facts.to_dict() for worker in self.pools[role] if worker is not without]
        engine_board.publish(self.application, role, engines)

    def watch_health(self) -> None:
        """Begin with what Ray Serve's health checks do: kill and replace what says that it is dead."""
        self._spawn(self._watch_health())

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
        return sum(worker.simulated.state()["blocks_held"] for worker in self.workers())

    def leases_expired(self) -> int:
        """Leases that ran out on any living engine."""
        return sum(worker.simulated.state()["leases_expired"] for worker in self.workers())

    async def settle(self) -> None:
        """Let the workers notice that a front end has left."""
        while any(worker._peers for worker in self.workers()):
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Stop everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self.workers():
            worker.shutdown()

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for worker in self.workers():
                try:
                    worker.check_health()
                except Exception:
                    self.kill(worker)

    async def _replace(self, role: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.add(role)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
