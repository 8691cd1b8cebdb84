"""Legs on workers: sent, their outputs taken, ended or given up.

A request has a leg for each half of it, and new ones after a loss. Whatever becomes of a leg, the blocks that it made
or was to pull are settled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from kv_transfer.handoff import Handoff, InvalidHandoff
from kv_transfer.ledger import Ledger
from runtime.account import Charge
from runtime.client_view import ClientView
from runtime.errors import LegFailed, PullFailed, WorkerDrained, WorkerLost
from runtime.fleet import Fleet
from runtime.link import Link
from runtime.live_request import LiveRequest
from runtime.placement import Placement

ABANDONED_KEEP_S = 600.0
"""How long an aborted prefill leg is remembered: it may have ended before the abort reached it, and then its handoff
has to be released. Longer than any lease that makes sense, so that nothing is forgotten before it frees itself."""


@dataclass(eq=False)
class Leg:
    """One half of a request on one worker. Ids are never used twice."""

    id: str
    engine_id: str
    live: LiveRequest
    charge: Charge
    decodes: bool
    done: asyncio.Future[EngineCoreOutput]
    abandoned: bool = False  # a prefill leg that was told to abort, and may have ended before

    @classmethod
    def of(cls, live: LiveRequest, engine_id: str, charge: Charge, *, decodes: bool) -> Leg:
        """A request's next leg."""
        live.legs += 1
        return cls(
            id=f"{live.id}-{'d' if decodes else 'p'}{live.legs}",
            engine_id=engine_id,
            live=live,
            charge=charge,
            decodes=decodes,
            done=asyncio.get_running_loop().create_future(),
        )

    def pulls_from(self, engine_id: str) -> bool:
        """Whether it reads, or will, blocks of this prefill worker."""
        handoff = self.live.handoff
        return self.decodes and handoff is not None and handoff.engine_id == engine_id

    def end(self, result: EngineCoreOutput | Exception) -> None:
        """End with the last output or a fault, unless it has ended."""
        if self.done.done():
            return
        if isinstance(result, Exception):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)


class Legs:
    """The legs of one front end that are under way.

    Args:
        ledger: where the handoffs of legs that were given up are settled.
        placement: is told of each plan's first token.
        seen: is told of the tokens that go to clients.
        deliver: called with what one engine step made for clients, under their requests' ids.
        ended: called after each leg: its worker may have room for another request.
    """

    fleet: Fleet  # set by `Cluster.connect`: to make one takes `on_outputs` and `on_lost`

    def __init__(
        self,
        ledger: Ledger,
        placement: Placement,
        seen: ClientView,
        deliver: Callable[[list[EngineCoreOutput]], None],
        ended: Callable[[], None],
    ) -> None:
        self.by_id: dict[str, Leg] = {}
        self._ledger = ledger
        self._placement = placement
        self._seen = seen
        self._deliver = deliver
        self._ended = ended

    async def run(self, leg: Leg, request: EngineCoreRequest) -> EngineCoreOutput:
        """Send a leg to its worker and wait for its last output; abort it when the request is cancelled.

        Raises:
            WorkerLost: the worker is gone, or was lost on the way (`WorkerDrained`: it was to go).
            LegFailed: its engine ended the leg with an error (`PullFailed`: before it had the blocks).
        """
        link = self.fleet.link(leg.engine_id)
        if link is None:
            raise WorkerLost(leg.engine_id, "it left before the leg was sent")
        self.by_id[leg.id] = leg
        number = link.submit(request, leg.charge.reads or leg.charge.pulls)
        self.fleet.sent(leg.engine_id, leg.charge, number)
        try:
            return await leg.done
        except asyncio.CancelledError:
            self._leave(leg, link)
            raise
        finally:
            if not leg.abandoned:
                self.by_id.pop(leg.id, None)
            self._ended()

    def on_outputs(self, batch: EngineCoreOutputs) -> None:
        """Take one step's outputs of one worker: the hot path, once per step and not per token."""
        ours: list[EngineCoreOutput] = []
        now = time.monotonic()
        for output in batch.outputs:
            leg = self.by_id.get(output.request_id)
            if leg is None:
                continue
            if leg.decodes and output.finish_reason is FinishReason.ERROR:
                self._failed(leg)
            elif leg.decodes:
                self._decoded(leg, output, now)
                ours.append(output)
            elif output.finished:
                self._prefilled(leg, output)
        if ours:
            self._deliver(ours)

    def on_lost(self, engine_id: str, why: str, *, drained: bool = False) -> None:
        """Plan every request of a lost worker again; `drained`: it was to go anyway.

        Also those whose blocks are being pulled from it. It may live on behind a broken link, and then it frees what
        was ours: a pull that goes on would read what others write there.
        """
        self._ledger.forget(engine_id)
        for leg in list(self.by_id.values()):
            pulls = leg.pulls_from(engine_id)
            if leg.engine_id == engine_id and leg.abandoned:
                self.by_id.pop(leg.id)
            elif leg.engine_id == engine_id or pulls:
                leg.end(WorkerDrained(engine_id, why) if drained else WorkerLost(engine_id, why))
                if pulls and (link := self.fleet.link(leg.engine_id)) is not None:
                    link.send([leg.id])

    def _prefilled(self, leg: Leg, output: EngineCoreOutput) -> None:
        """Take a prefill leg's end."""
        if not leg.abandoned:
            leg.end(output)
            return
        self.by_id.pop(leg.id, None)
        self._nobody_pulls(output)

    def _decoded(self, leg: Leg, output: EngineCoreOutput, now: float) -> None:
        """Take a decode leg's next tokens, and make of `output` what the client is to get."""
        live = leg.live
        if not leg.charge.begun:
            self.fleet.begun(leg.engine_id, leg.charge)
            self._placement.first_token(live.id)
        if output.prefill_stats is not None:
            self.fleet.worked(leg.engine_id)
            if live.made:
                output.prefill_stats = None  # the client's prompt was read long ago
            elif live.handoff is not None:
                # What the client calls cached is what nobody had to compute, so it is the prefill engine's figure.
                output.prefill_stats.num_cached_tokens = live.handoff.cached_tokens or 0
        if live.handoff is not None:  # the first output says that the blocks are here
            self.fleet.worked(live.handoff.engine_id)
            self._ledger.pulled(live.handoff)
            live.handoff = None
        live.made += output.new_token_ids
        if live.clock is not None:
            self._seen.tokens(live.clock, len(output.new_token_ids), now)
        output.request_id = live.id
        if output.finished:
            leg.end(output)

    def _failed(self, leg: Leg) -> None:
        """Take a decode leg's error; as long as there is a handoff, it is the pull that failed."""
        fault = LegFailed if leg.live.handoff is None else PullFailed
        leg.end(fault(f"leg {leg.id} failed on {leg.engine_id}"))

    def _leave(self, leg: Leg, link: Link) -> None:
        """Abort a leg whose request was cancelled, so that its blocks are settled whatever becomes of it."""
        if not leg.done.cancelled():  # it had ended in the same moment; a lost or failed one leaves its handoff with us
            if leg.done.exception() is None and not leg.decodes:
                self._nobody_pulls(leg.done.result())
            return
        link.send([leg.id])
        if not leg.decodes:
            leg.abandoned = True
            asyncio.get_running_loop().call_later(ABANDONED_KEEP_S, self.by_id.pop, leg.id, None)
        elif leg.live.handoff is not None and link.lost is None:
            self._ledger.entrust(leg.live.handoff, leg.engine_id)
            leg.live.handoff = None

    def _nobody_pulls(self, output: EngineCoreOutput) -> None:
        """Release what a prefill leg has made after its request was cancelled."""
        with contextlib.suppress(InvalidHandoff):  # the abort came first: nothing is pinned
            handoff = Handoff.from_params(output.kv_transfer_params)
            self._ledger.open(handoff)
            self._ledger.release(handoff, "abandoned")
