"""A request's life. The cluster is to vLLM's front end what one engine core is to a plain vLLM server.

`Cluster` implements vLLM's `EngineCoreClient`: `EngineCoreRequest` in, `EngineCoreOutputs` out. Read `Cluster._serve`
first: plan, prefill, decode, go on after a loss, settle. Its legs on the workers are in `legs.py`; what is asked of all
workers alike is in `every_worker.py`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from decode.request import decode_leg
from decode.resume import is_exact, why_not_resumable
from kv_transfer.handoff import Handoff, InvalidHandoff, release_leg
from kv_transfer.ledger import Ledger
from prefill.request import prefill_leg
from runtime.account import Charge, charges
from runtime.client_view import ClientView, StreamClock
from runtime.errors import BatonError, LegFailed, PullFailed, Refusal, Unrecoverable, WorkerDrained, WorkerLost
from runtime.every_worker import EveryWorker
from runtime.fleet import Fleet
from runtime.legs import Leg, Legs
from runtime.limit_settings import LimitSettings
from runtime.live_request import LiveRequest, trusted
from runtime.metrics import RECOVERIES
from runtime.placement import Placement
from runtime.policy.admission import AdmissionPolicy
from runtime.policy.objectives import Objectives
from runtime.policy.types import Disaggregated, Plan
from runtime.steps import as_one_step
from runtime.visit import Visit, current_visit
from runtime.waiting_room import WaitingRoom

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("baton.cluster")

FAILED_PULLS = 2
"""After so many failed pulls a request runs whole on one worker: its next pull could hang as long again."""


@dataclass
class Resources:
    """What `AsyncLLM` reads of its client's processes: the cluster as a whole never dies, its workers do."""

    engine_dead: bool = False


class Cluster(EveryWorker):
    """vLLM's engine core client over two pools of workers."""

    def __init__(
        self,
        limits: LimitSettings,
        placement: Placement,
        admission: AdmissionPolicy | None = None,
        objectives: Objectives | None = None,
    ) -> None:
        self.engine_ranks_managed = [0]
        self.resources = Resources()
        self.placement = placement
        self.seen = ClientView(objectives)
        self.room = WaitingRoom(
            admission or AdmissionPolicy(),
            limits.wait_for_worker_s,
            coming=lambda: self.fleet.starting(),
            changed=lambda: self.fleet.changed,
        )
        self.ledger = Ledger(self._send_release, lambda handoff: self.fleet.settled(handoff))
        self.legs = Legs(self.ledger, placement, self.seen, self._deliver, self.room.poke)
        self._limits = limits
        self._live: dict[str, LiveRequest] = {}
        self._pins: dict[str, Plan] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    def connect(self, front_end: str, handles: dict[str, DeploymentHandle], token: str) -> None:
        """Make the fleet; it has no workers until it follows an application.

        Args:
            front_end: a name that no other front end has.
            handles: the deployment of each role.
            token: what the workers know this application's front ends by.
        """
        self.fleet = self.legs.fleet = Fleet(
            front_end,
            handles,
            token,
            self.legs.on_outputs,
            self.legs.on_lost,
            self.ledger.unsettled,
            self._limits.grace.move_s,
        )

    def pin(self, external_request_id: str, plan: Plan) -> None:
        """Fix the plan of a request to come: for warming a given pair of workers."""
        self._pins[external_request_id] = plan

    def waiting(self) -> tuple[int, int]:
        """Requests that no worker has yet, and their prompt tokens."""
        lengths = [len(live.request.prompt_token_ids or ()) for live in self._live.values() if not live.legs]
        return len(lengths), sum(lengths)

    # A request's life

    async def _serve(self, live: LiveRequest) -> None:
        """Plan, prefill, decode; after a loss plan again and go on where the client is; settle whatever happens."""
        outcome = "aborted"
        try:
            while True:
                plan = await self._plan(live)
                try:
                    await self._once(live, plan)
                    outcome = "done"
                    return
                except (WorkerLost, LegFailed, InvalidHandoff) as loss:
                    self._blame(live, plan, loss)
                    self._settle(live, "lost")
                    self._go_on(live, loss)
        except Refusal as refusal:
            outcome = "refused"
            logger.debug("request %s refused (%s): %s", live.id, refusal.reason, refusal)
            live.visit.refuse(refusal)
            self._finish(live, FinishReason.ERROR)  # ends it in vLLM's front end; the edge tells the client
        except BatonError as error:
            outcome = "failed"
            logger.error("request %s failed: %s", live.id, error)
            self._finish(live, FinishReason.ERROR)
        finally:
            self._settle(live, "abandoned")
            self._live.pop(live.id, None)
            if live.visit.admitted:
                self.room.ended(live.visit, len(live.request.prompt_token_ids or ()), len(live.made))
            if live.clock is not None:
                self.seen.ended(live.clock, outcome, time.monotonic())

    async def _once(self, live: LiveRequest, plan: Plan) -> None:
        request = live.remaining()
        prompt = len(request.prompt_token_ids or ())
        answer = (request.sampling_params.max_tokens or 0) if request.sampling_params else 0
        writes, reads = charges(plan, prompt, answer)
        with self.fleet.charged(plan.decode, writes):  # from now on, or a burst would all go to one worker
            if isinstance(plan, Disaggregated) and reads is not None:
                with self.fleet.charged(plan.prefill, reads):
                    live.handoff = await self._prefill(live, request, plan.prefill, reads)
                    self.ledger.open(live.handoff)  # before the charge ends, or a draining worker would go now
            await self._decode(live, request, plan.decode, writes)

    async def _plan(self, live: LiveRequest) -> Plan:
        """Choose the workers, as soon as it is the request's turn; while there are none, wait, within bounds."""
        if live.pinned is not None:
            return live.pinned
        request = live.remaining()
        keys = self.placement.cache.keys_of(request)
        level = live.visit.level_for(live.request.priority)
        whole = live.failed_pulls >= FAILED_PULLS
        plan, look = await self.room.enter(
            live.visit, level, lambda: self.placement.look(request, keys, self.fleet.snapshot(), whole=whole)
        )
        self.placement.chose(request, keys, look, plan)
        if live.clock is not None:
            on_prefill = self.fleet.role(plan.decode) == "prefill"
            self.seen.planned(live.clock, plan, len(live.request.prompt_token_ids or ()), on_prefill=on_prefill)
        return plan

    async def _prefill(self, live: LiveRequest, request: EngineCoreRequest, engine_id: str, charge: Charge) -> Handoff:
        """Run the prefill leg; what comes back is where the blocks are."""
        leg = Leg.of(live, engine_id, charge, decodes=False)
        output = await self.legs.run(leg, prefill_leg(request, leg.id))
        return Handoff.from_params(output.kv_transfer_params)

    async def _decode(self, live: LiveRequest, request: EngineCoreRequest, engine_id: str, charge: Charge) -> None:
        """Run the decode leg; its tokens go to the front end as they come (`Legs.on_outputs`)."""
        leg = Leg.of(live, engine_id, charge, decodes=True)
        await self.legs.run(leg, decode_leg(request, leg.id, live.handoff))

    def _blame(self, live: LiveRequest, plan: Plan, fault: BatonError | InvalidHandoff) -> None:
        """Count a fault against the workers that can have made it."""
        if isinstance(fault, PullFailed):
            live.failed_pulls += 1
        if isinstance(fault, LegFailed):
            self.fleet.failed(plan.decode, live.id)
        if isinstance(plan, Disaggregated) and isinstance(fault, PullFailed | InvalidHandoff):
            self.fleet.failed(plan.prefill, live.id)

    def _go_on(self, live: LiveRequest, loss: BatonError | InvalidHandoff) -> None:
        """Count a loss and return when the request may be planned again; raise what it fails with when not."""
        live.losses += not isinstance(loss, WorkerDrained)
        if live.losses > self._limits.retry_budget or live.pinned is not None:
            raise Unrecoverable(f"{loss}, and its retry budget is spent") from loss
        if live.made and (why_not := self._why_not_resumable(live)):
            raise Unrecoverable(f"{loss}, and {why_not}") from loss
        RECOVERIES.labels(kind="resumed" if live.made else "retried", fault=type(loss).__name__).inc()
        logger.warning("request %s goes on after %d tokens: %s", live.id, len(live.made), loss)

    def _why_not_resumable(self, live: LiveRequest) -> str | None:
        if self._limits.resume == "exact" and not is_exact(live.request):
            return "its sampling can't be continued exactly (limits.resume)"
        return why_not_resumable(live.request)

    def _settle(self, live: LiveRequest, reason: str) -> None:
        """Release the handoff unless a decode engine has taken it over."""
        if live.handoff is not None:
            self.ledger.release(live.handoff, reason)
            live.handoff = None

    def _send_release(self, handoff: Handoff) -> None:
        """Tell the prefill engine that nobody will pull these blocks. One that is lost has none any more, or its worker
        releases them itself: they are of a front end that it has lost."""
        if (link := self.fleet.link(handoff.engine_id)) is not None:
            link.send(release_leg(handoff))

    def _finish(self, live: LiveRequest, reason: FinishReason) -> None:
        self._deliver([EngineCoreOutput(request_id=live.id, new_token_ids=[], finish_reason=reason)])

    def _deliver(self, outputs: list[EngineCoreOutput]) -> None:
        """Queue outputs for vLLM's front end."""
        # The workers' timestamps are monotonic clocks of their machines: a new record has one of ours.
        self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))

    # vLLM's EngineCoreClient

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start a request's life."""
        pinned = self._pins.pop(request.external_req_id or "", None)
        live = LiveRequest(trusted(request), pinned, current_visit.get() or Visit())
        if pinned is None:
            live.clock = StreamClock.since(request.arrival_time)
        self._live[live.id] = live
        live.task = asyncio.get_running_loop().create_task(self._serve(live), context=contextvars.Context())

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs, of any worker: all that have come, as one step."""
        outputs = [await self._outputs.get()]
        while not self._outputs.empty():
            outputs.append(self._outputs.get_nowait())
        return as_one_step(outputs)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """End these requests wherever they are."""
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None and live.task is not None:
                live.task.cancel()

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        """Baton serves text generation."""
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """Let go of the workers; they abort what was ours."""
        for live in list(self._live.values()):
            if live.task is not None:
                live.task.cancel()
        self.placement.cache.close()
        self.fleet.close()
