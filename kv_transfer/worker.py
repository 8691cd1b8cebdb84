"""One engine core and the front ends that it works for. `worker_replica.py` makes a Ray Serve replica of it.

Front ends reach a worker by three calls. `exchange` hands over new legs and aborts, in order; `outputs` is one
long-lived stream for each front end that carries a batch per engine step; `call` reaches the core's utility methods.
Each names the engine id that the caller believes to talk to, so a call can't reach another incarnation by mistake, and
carries the token of its application, so that no other application's front end can use these workers.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

from kv_transfer.engine import Engine, EngineDied, start_engine
from kv_transfer.engine_watch import EngineWatch
from kv_transfer.handoff import Handoff, kv_params, release_leg
from kv_transfer.load import PERIOD_S, Meter, News
from kv_transfer.peer import NoStream, Peer, WrongApplication, WrongIncarnation
from kv_transfer.peers import Peers, everybody_has_noticed
from kv_transfer.self_measurement import measure
from kv_transfer.settings import EngineSettings
from kv_transfer.worker_endpoint import WorkerMetrics

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

    Command: TypeAlias = EngineCoreRequest | list[str]
    """What a front end sends: a leg to run, or the ids of legs to abort."""

logger = logging.getLogger("baton.worker")


MESSAGE_S = 0.002
"""Messages to a front end leave at least so far apart. No step of a real engine is that short; what an engine makes
faster goes in one message, which costs both sides about a millisecond whatever it carries."""


STREAM_MESSAGES = 5_000
"""An output stream is followed by a new one after so many messages: Ray keeps a record of each, some 400 bytes at both
ends, until the stream ends."""


class EngineWorker:
    """Owns one engine core, from start to death: when the core dies the worker reports unhealthy and is replaced."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._peers = Peers()
        self._token = ""
        self._meter: Meter
        self._watch: EngineWatch
        self._dead: str | None = None
        self._metrics: WorkerMetrics | None = None
        self._start_s: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def engine(self) -> Engine:
        """The engine; only there once `start` has returned."""
        assert self._engine is not None
        return self._engine

    async def start(self, settings: EngineSettings) -> None:
        """Start the engine and begin to hand out its outputs."""
        started = time.monotonic()
        self._token = settings.token
        self._engine = await start_engine(settings)
        self._meter = Meter(self.engine.facts.num_blocks, self.engine.facts.max_step_tokens or 0)
        await measure(self.engine, self._meter.costs)
        self._watch = EngineWatch(
            self.engine,
            settings.hang_s,
            settings.pull_timeout_s,
            has_work=lambda: bool(self._peers.owners),
            on_hang=self._hangs,
            give_up=self._give_up,
        )
        self._spawn(self._hand_out())
        self._spawn(self._peers.drop_silent())
        self._spawn(self._watch.watch_steps())
        self._spawn(self._watch.watch_handoffs())
        self._spawn(self._tell_load())
        self._start_s["engine"] = time.monotonic() - started
        logger.info("%s engine %s up in %.1f s", settings.role, self.engine.facts.engine_id, self._start_s["engine"])

    async def exchange(
        self,
        engine_id: str,
        token: str,
        front_end: str,
        commands: list[Command],
        settled: list[str],
        expected: dict[str, int],
    ) -> None:
        """Take legs to run and legs to abort, in the order given, and the ids of legs whose handoffs are settled.

        Args:
            expected: for a leg's id, how many prompt tokens the front end expects to be read or fetched here.
        """
        self._check(engine_id, token)
        peer = self._peers.get(front_end)
        if peer is None:
            raise NoStream(front_end)
        peer.heard = time.monotonic()
        for command in commands:
            if self._peers.get(front_end) is not peer:  # it left while the engine took the command before
                raise NoStream(front_end)
            if isinstance(command, list):
                await self._abort(command)
                continue
            if not command.abort_immediately:  # a release produces nothing that anybody waits for
                self._peers.took(command.request_id, front_end, peer)
                if kv_params(command).get("do_remote_prefill"):
                    self._watch.pulls.came(command.request_id)
                self._meter.took(command, expected.get(command.request_id), time.monotonic())
            await self.engine.add(command)
        for leg_id in settled:  # last: their releases are among the commands
            peer.handoffs.pop(leg_id, None)

    async def outputs(
        self, engine_id: str, token: str, front_end: str
    ) -> AsyncIterator[list[EngineCoreOutputs | News] | None]:
        """Stream the outputs of this front end's legs, all steps since the last message in one; first the load.

        News of the load come in between whenever it has changed. None asks the front end to open the next stream, which
        takes over from this one. The stream ends when the engine dies. When the front end leaves, its legs are aborted.
        """
        self._check(engine_id, token)
        peer, handed_over = self._peers.get(front_end), False
        try:
            if peer is None or not peer.take_over():
                peer = self._peers.join(front_end)
                peer.told = News(self._meter.load(time.monotonic()), 0)
                yield [peer.told]
            for _ in range(STREAM_MESSAGES):
                if not (batch := await peer.batch()):
                    return
                yield batch
                await asyncio.sleep(MESSAGE_S)
            following = peer.next_stream()
            yield None
            handed_over = await following
        finally:
            if peer is not None and not handed_over:
                await self._left(front_end, peer)

    async def _left(self, front_end: str, peer: Peer) -> None:
        """Abort the legs of a front end that is gone, and release what it had not settled."""
        self._peers.leave(front_end, peer)
        await self._abort(list(peer.legs))
        if peer.handoffs:
            self._counts["orphans"] += len(peer.handoffs)
            self._spawn(self._release_orphans(list(peer.handoffs.values())))

    async def call(self, engine_id: str | None, token: str, method: str, args: list[Any]) -> Any:
        """Call a utility method of the engine core; `None` asks whichever worker answers."""
        self._check(engine_id, token)
        return await self.engine.call(method, *args)

    async def describe(self, engine_id: str | None, token: str) -> Any:
        """The `VllmConfig` for a front end; `None` asks whichever worker answers."""
        self._check(engine_id, token)
        return await asyncio.to_thread(self.engine.vllm_config)

    def needed_tokens(self) -> float:
        """How many tokens of the KV here somebody needs or is likely to need."""
        waiting = sum(Handoff.from_params(params).tokens for params in self._peers.handoffs())
        return self._meter.needed_tokens(time.monotonic()) + waiting

    def check_health(self) -> None:
        """Raise when the engine is dead, so that Ray Serve replaces this replica."""
        if self._dead is not None:
            raise EngineDied(self._dead)

    def shutdown(self) -> None:
        """Stop the engine and all of its processes."""
        while self._tasks:
            self._tasks.pop().cancel()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _hand_out(self) -> None:
        """Pass each step's outputs on to the front ends, until the engine dies."""
        try:
            while True:
                outputs = await self.engine.outputs()
                now = time.monotonic()
                self._watch.stepped(outputs, now)
                if self._metrics is not None:
                    self._metrics.stepped(outputs)
                self._meter.stepped(outputs, now)
                for params in self._peers.hand_out(outputs):
                    self._spawn(self._release([params]))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it was, nobody hands out tokens any more: the worker has to go
            self._die(str(error))

    async def _tell_load(self) -> None:
        """Tell front ends what is here whenever that has changed, a few times a second."""
        while self._dead is None:
            await asyncio.sleep(PERIOD_S)
            self._peers.tell(self._meter.load(time.monotonic()))

    def _die(self, why: str) -> None:
        self._dead = why
        logger.error("engine %s died: %s", self.engine.facts.engine_id, why)
        self._watch.end()
        self._peers.end()

    def _hangs(self, why: str) -> None:
        self._die(why)
        self.engine.shutdown()

    async def _give_up(self, leg_id: str) -> None:
        """End a leg whose pull hangs, as if it had failed. The engine keeps its blocks until the transfer is over."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        self._counts["pulls_hung"] += 1
        logger.warning("the pull of leg %s hangs and is given up", leg_id)
        peer = self._peers.owner(leg_id)
        await self._abort([leg_id])
        if peer is not None:
            failed = EngineCoreOutput(leg_id, [], finish_reason=FinishReason.ERROR)
            peer.queue.put_nowait(EngineCoreOutputs(outputs=[failed]))

    async def _release_orphans(self, handoffs: list[dict[str, Any]]) -> None:
        """Free what a front end that is gone had not settled, once no decode engine reads it any more.

        Decode workers notice the same loss, or are told by the front end if only its link to here broke, and end the
        legs that pull. Until then blocks that are written anew would be read into a decode engine's prefix cache.
        """
        await everybody_has_noticed()
        logger.warning("%d handoffs of a front end that left are released", len(handoffs))
        await self._release(handoffs)

    async def _release(self, handoffs: list[dict[str, Any]]) -> None:
        """Free the blocks of finished prefills that nobody will pull, by their KV transfer parameters."""
        for params in handoffs:
            if self._dead is None and self._engine is not None:  # else the blocks are gone with it
                await self._engine.add(release_leg(Handoff.from_params(params)))

    async def _abort(self, leg_ids: list[str]) -> None:
        for leg_id in leg_ids:
            self._forget(leg_id)
            self._meter.dropped(leg_id)
        if leg_ids and self._dead is None and self._engine is not None:
            await self._engine.abort(leg_ids)

    def _forget(self, leg_id: str) -> None:
        self._watch.pulls.over(leg_id)
        self._peers.over(leg_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tell of a task that failed, once: nobody waits for it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._counts["failed_tasks"] += 1
            logger.error("a task of this worker failed", exc_info=error)

    def _check(self, engine_id: str | None, token: str) -> None:
        """Refuse a caller of another application, and one that means another engine (`None`: whichever is here)."""
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            raise WrongApplication
        if self._dead is not None:
            raise EngineDied(self._dead)
        here = self.engine.facts.engine_id
        if engine_id not in (None, here):
            raise WrongIncarnation(str(engine_id), here)
