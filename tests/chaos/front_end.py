"""A front end over a fabric: real cluster, fleet, links and warmer, without HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from runtime.cache_view import CacheView
from runtime.cluster import Cluster
from runtime.limit_settings import LimitSettings
from runtime.placement import Placement
from runtime.policy.admission import AdmissionPolicy
from runtime.policy.types import PRESETS
from runtime.warmup import Warmer
from tests.chaos.fabric import ROLES, Fabric
from tests.chaos.handles import Handle


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
        fabric.watch_health()
        front_end = FrontEnd(fabric, *args, **limits)
        made.extend((front_end, fabric))
        await front_end.start()
        return fabric, front_end

    yield start
    for thing in made:
        await thing.close()
