"""The live view of both pools: who is there, who may take work, what this front end has sent to each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from kv_transfer.engine import EngineFacts
from kv_transfer.handoff import Handoff
from kv_transfer.load import News
from kv_transfer.nixl import IncompatibleEngines, check_compatible
from runtime.account import Charge
from runtime.engine_board import subscribe
from runtime.link import Link
from runtime.metrics import SET_ASIDE, WORKERS_LOST
from runtime.policy.pool import Pool
from runtime.policy.types import Snapshot
from runtime.stream_reader import StreamReader
from runtime.worker import State, Worker

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from vllm.v1.engine import EngineCoreOutputs

logger = logging.getLogger("baton.fleet")


RECONNECT_S = 1.0
"""Pause before a lost link to a worker that is still announced is made anew; doubled each time that it did not last."""

LASTING_LINK_S = 10.0
MOST_DOUBLINGS = 5


class OnLost(Protocol):
    """What the cluster does about a lost worker."""

    def __call__(self, engine_id: str, why: str, *, drained: bool) -> None: ...


EVENTS_KEPT = 20
"""So many deaths and returns of workers are remembered for `baton top`."""

HANDOFF_MEMORY = 64.0
"""The usual time of a message counts 1/e after so many news."""


class Fleet:
    """Follows the replicas of both deployments: a link to each, warm before it takes traffic, gone when it breaks.

    Args:
        handles: the deployment of each role.
        token: what the workers of this application know its front ends by.
        on_outputs: called with each batch of step outputs.
        on_lost: called with the engine id, the reason, and whether it was to go, when a worker is lost.
        unsettled: how many handoffs of each prefill engine somebody may still pull.
        drain_s: how long a worker that Ray Serve took away may take to finish what it has.
    """

    def __init__(
        self,
        front_end: str,
        handles: dict[str, DeploymentHandle],
        token: str,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_lost: OnLost,
        unsettled: Callable[[], Counter[str]],
        drain_s: float,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.changed = asyncio.Event()
        self._front_end = front_end
        self._handles = handles
        self._token = token
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._unsettled = unsettled
        self._drain_s = drain_s
        self._announced: dict[str, dict[str, EngineFacts]] = {}
        self._flaps: Counter[str] = Counter()  # short-lived links in a row, by engine id
        self._snapshot: Snapshot | None = None  # None when workers have come, gone or changed their state since
        self._newer: set[str] = set()  # workers whose views have changed since
        self._handoff_s = 0.0
        self._closed = False
        self._reader = StreamReader()
        self._connecting: set[asyncio.Task[None]] = set()
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)

    def follow(self, application: str) -> None:
        """Begin to follow Ray Serve's news of both pools."""
        loop = asyncio.get_running_loop()

        def listener(role: str) -> Callable[[list[dict[str, Any]]], object]:
            return lambda engines: loop.call_soon_threadsafe(self._update, role, engines)

        for role, handle in self._handles.items():
            subscribe(application, handle.deployment_name, listener(role))

    def snapshot(self) -> Snapshot:
        """The workers that may take work now, and their loads."""
        snapshot = self._snapshot
        if snapshot is None:
            snapshot = Snapshot(self._ready("prefill"), self._ready("decode"))
        else:
            for engine_id in self._newer:  # a worker that can take no work is in neither pool
                worker = self.workers.get(engine_id)
                if worker is not None and worker.state is State.READY:
                    snapshot = snapshot.with_view(worker.account.view())
        self._newer.clear()
        self._snapshot = replace(snapshot, handoff_s=self._handoff_s)
        return self._snapshot

    def ready(self) -> bool:
        """Whether both pools can serve."""
        snapshot = self.snapshot()
        return bool(snapshot.prefill and snapshot.decode)

    def starting(self) -> bool:
        """Whether a worker is on its way to take traffic."""
        return bool(self.in_state(State.CONNECTING) or self.in_state(State.WARMING))

    def link(self, engine_id: str) -> Link | None:
        """The link to a worker, or None when it is gone."""
        worker = self.workers.get(engine_id)
        return worker.link if worker else None

    def role(self, engine_id: str) -> str | None:
        """The pool that a worker is of, or None when it is gone."""
        worker = self.workers.get(engine_id)
        return worker.link.facts.role if worker else None

    def links(self, role: str | None = None) -> list[Link]:
        """The links of a pool, or of both."""
        return [w.link for w in self.workers.values() if role in (None, w.link.facts.role) and w.state is State.READY]

    def in_state(self, state: State) -> list[Worker]:
        """The workers in one state."""
        return [worker for worker in self.workers.values() if worker.state is state]

    @contextmanager
    def charged(self, engine_id: str, charge: Charge) -> Iterator[None]:
        """Count a leg as a worker's load until the block ends."""
        worker = self.workers.get(engine_id)
        if worker is None:
            yield
            return
        worker.account.open(charge)
        self._newer.add(engine_id)
        try:
            yield
        finally:
            worker.account.close(charge)
            self._newer.add(engine_id)
            self.close_if_drained(engine_id)

    def sent(self, engine_id: str, charge: Charge, number: int) -> None:
        """Note that a leg is on its way, as which one of its link."""
        if worker := self.workers.get(engine_id):
            worker.account.sent(charge, number)
            self._newer.add(engine_id)

    def begun(self, engine_id: str, charge: Charge) -> None:
        """Note a leg's first output."""
        if worker := self.workers.get(engine_id):
            worker.account.begun(charge)
            self._newer.add(engine_id)

    def failed(self, engine_id: str, request_id: str) -> None:
        """Count a failure; after some in a row the worker is set aside until it is warmed anew."""
        if (worker := self.workers.get(engine_id)) and worker.failed(request_id):
            SET_ASIDE.labels(role=worker.link.facts.role).inc()
            self.set_state(worker, State.WARMING)

    def worked(self, engine_id: str) -> None:
        """Note a leg that worked."""
        if worker := self.workers.get(engine_id):
            worker.worked()

    def settled(self, handoff: Handoff) -> None:
        """Tell the prefill worker of a handoff that nobody needs its blocks any more."""
        if worker := self.workers.get(handoff.engine_id):
            worker.link.settled(handoff.leg_id)
            self.close_if_drained(handoff.engine_id)

    def close_if_drained(self, engine_id: str) -> None:
        """Let go of a draining worker once it has no legs and holds no blocks that somebody will pull."""
        worker = self.workers.get(engine_id)
        if worker is None or worker.state is not State.DRAINING:
            return
        if not worker.account.requests and not self._unsettled()[engine_id]:
            worker.link.close("it is drained")

    def set_state(self, worker: Worker, state: State) -> None:
        """Move a worker to `state` and wake whoever waits for a change."""
        worker.enter(state)
        self._note(worker.link.facts, state.value)
        logger.info("%s worker %s is %s", worker.link.facts.role, worker.link.facts.engine_id, state.value)
        self._wake()

    def close(self) -> None:
        """Close all links."""
        self._closed = True
        for worker in list(self.workers.values()):
            worker.link.close()
        self._reader.close()

    def _ready(self, role: str) -> Pool:
        ready = [w for w in self.workers.values() if w.state is State.READY and w.link.facts.role == role]
        return Pool(worker.account.view() for worker in ready)

    def _on_news(self, link: Link, news: News) -> None:
        worker = self.workers.get(link.facts.engine_id)
        if worker is None or worker.link is not link:
            return
        worker.account.news(news)
        self._newer.add(link.facts.engine_id)
        if link.exchange_s is not None:
            memory = HANDOFF_MEMORY if self._handoff_s else 1.0
            self._handoff_s += (link.exchange_s - self._handoff_s) / memory

    def _update(self, role: str, engines: list[dict[str, Any]]) -> None:
        present = {facts["engine_id"]: EngineFacts(**facts) for facts in engines}
        self._announced[role] = present
        for engine_id, facts in present.items():
            if engine_id not in self.workers:
                self._connect(facts)
        for engine_id, worker in list(self.workers.items()):
            if worker.link.facts.role != role:
                continue
            if engine_id not in present and worker.state is not State.DRAINING:
                self._drain(worker)
            elif engine_id in present and worker.state is State.DRAINING:
                self._stay(worker)

    def _drain(self, worker: Worker) -> None:
        """Give a worker no more work; what it has not finished in time moves elsewhere."""
        worker.start_drain_timer(self._drain_s)
        self.set_state(worker, State.DRAINING)
        self.close_if_drained(worker.link.facts.engine_id)

    def _stay(self, worker: Worker) -> None:
        """Take a worker back that Ray Serve announces again: its controller had only lost sight of it."""
        worker.stop_drain_timer()
        if worker.link.up.is_set():
            self._take_in(worker)
        else:
            self.set_state(worker, State.CONNECTING)

    def _connect(self, facts: EngineFacts) -> None:
        link = Link(
            self._handles[facts.role],
            facts,
            self._front_end,
            self._token,
            self._on_outputs,
            self._on_news,
            self._lost,
            self._reader,
        )
        worker = self.workers[facts.engine_id] = Worker(link)
        task = asyncio.get_running_loop().create_task(self._await_stream(worker))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _await_stream(self, worker: Worker) -> None:
        await worker.link.up.wait()
        if worker.link.lost is None and worker.state is State.CONNECTING:  # not drained meanwhile
            self._take_in(worker)

    def _take_in(self, worker: Worker) -> None:
        """Have a worker with a link warmed, unless it could not exchange KV with the other pool."""
        if problem := self._incompatible(worker.link.facts):
            logger.error("worker %s refused: %s", worker.link.facts.engine_id, problem)
            self.set_state(worker, State.REFUSED)
        else:
            self.set_state(worker, State.WARMING)

    def _incompatible(self, facts: EngineFacts) -> str | None:
        for other in self.workers.values():
            if other.state in (State.WARMING, State.READY) and other.link.facts.role != facts.role:
                pair = (facts, other.link.facts) if facts.role == "prefill" else (other.link.facts, facts)
                try:
                    check_compatible(*pair)
                except IncompatibleEngines as problem:
                    return str(problem)
        return None

    def _lost(self, link: Link, why: str) -> None:
        engine_id = link.facts.engine_id
        worker = self.workers.pop(engine_id)
        worker.stop_drain_timer()
        # Serve goes on announcing the dead for a second: that it can't be reached again is no other loss.
        once_more = worker.state is State.CONNECTING and engine_id in self._flaps
        if worker.state is not State.DRAINING and not once_more and not self._closed:
            WORKERS_LOST.labels(pool=link.facts.role).inc()
            self._note(link.facts, f"lost: {why}")
        logger.warning("%s worker %s lost: %s", link.facts.role, engine_id, why)
        self._on_lost(engine_id, why, drained=worker.state is State.DRAINING)
        short_lived = time.monotonic() - worker.linked < LASTING_LINK_S
        self._flaps[engine_id] = min(self._flaps[engine_id] + 1, MOST_DOUBLINGS) if short_lived else 0
        pause_s = RECONNECT_S * 2 ** self._flaps[engine_id]
        asyncio.get_running_loop().call_later(pause_s, self._reconnect, link.facts)
        self._wake()

    def _reconnect(self, facts: EngineFacts) -> None:
        """Try a lost worker again for as long as Ray Serve announces it: perhaps only the link broke."""
        if facts.engine_id not in self._announced[facts.role]:
            self._flaps.pop(facts.engine_id, None)
        elif not self._closed and facts.engine_id not in self.workers:
            self._connect(facts)

    def _note(self, facts: EngineFacts, what: str) -> None:
        self.events.append({"at": time.time(), "pool": facts.role, "engine_id": facts.engine_id, "what": what})

    def _wake(self) -> None:
        self._snapshot = None
        self.changed.set()
        self.changed = asyncio.Event()
