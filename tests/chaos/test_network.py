"""Pulls over a network that fails: two simulated engines in network namespaces of their own, with a cable between.

Needs root and `ip` (iproute2); skips elsewhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason

from decode.request import decode_leg
from kv_transfer.handoff import Handoff, release_leg
from kv_transfer.settings import EngineSettings, TransportSettings
from kv_transfer.sim_transfer import ANSWER_TIMEOUT_S
from kv_transfer.simulator import SimulatedEngine
from prefill.request import prefill_leg
from tests.chaos.model import answer, bare_model
from tests.unit.test_resume import engine_request

CLONE_NEWNET = 0x40000000
PROMPT = list(range(100))
LEASE_S = 8


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Side:
    """One end of the cable: a namespace, and a thread in it whose event loop runs an engine."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.link = name, address, f"v{name[-8:]}"
        ip("netns", "add", name)

    def start(self) -> None:
        """Begin to run things inside."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with Path(f"/run/netns/{self.name}").open() as namespace:
            result = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET)
            assert result == 0, os.strerror(ctypes.get_errno())
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 30.0) -> Any:
        """Run something inside, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def plug(self, state: str) -> None:
        """Pull the cable (`down`) or put it back (`up`)."""
        ip("-n", self.name, "link", "set", self.link, state)

    def close(self) -> None:
        """Remove the namespace, and with it this end of the cable."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        ip("netns", "del", self.name)


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """The prefill and the decode side, connected."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    mark = uuid.uuid4().hex[:6]
    try:
        prefill, decode = Side(f"bp{mark}", "10.77.0.1"), Side(f"bd{mark}", "10.77.0.2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    ip("-n", prefill.name, "link", "add", prefill.link, "type", "veth", "peer", decode.link, "netns", decode.name)
    for side in (prefill, decode):
        ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", side.link)
        ip("-n", side.name, "link", "set", "lo", "up")
        side.plug("up")
        side.start()
    yield prefill, decode
    prefill.close()
    decode.close()


@pytest.fixture
def engines(sides: tuple[Side, Side], tmp_path: Path) -> Iterator[tuple[SimulatedEngine, SimulatedEngine]]:
    """A simulated engine on each side."""
    model = str(bare_model(tmp_path))

    def settings(role: Any, host: str) -> EngineSettings:
        transport = TransportSettings(host=host, lease_s=LEASE_S)  # type: ignore[call-arg]
        return EngineSettings(role=role, kind="simulated", model=model, transport=transport)

    started = [
        side.run(SimulatedEngine.start(settings(role, side.address)))
        for side, role in zip(sides, ("prefill", "decode"), strict=True)
    ]
    yield started[0], started[1]
    for side, engine in zip(sides, started, strict=True):
        side.run(_stop(engine))


async def _stop(engine: SimulatedEngine) -> None:
    engine.shutdown()


async def leg(engine: SimulatedEngine, request: Any) -> list[EngineCoreOutput]:
    """All outputs of one leg."""
    await engine.add(request)
    outputs: list[EngineCoreOutput] = []
    while not outputs or not outputs[-1].finished:
        outputs += (await engine.outputs()).outputs
    return outputs


def prefilled(side: Side, engine: SimulatedEngine) -> Handoff:
    """A finished prefill that waits to be pulled."""
    request = engine_request(SamplingParams(max_tokens=5, temperature=0.0), prompt_token_ids=PROMPT)
    return Handoff.from_params(side.run(leg(engine, prefill_leg(request, uuid.uuid4().hex)))[-1].kv_transfer_params)


def decoded(side: Side, engine: SimulatedEngine, handoff: Handoff) -> list[EngineCoreOutput]:
    """What the decode leg for it gives."""
    request = engine_request(SamplingParams(max_tokens=5, temperature=0.0), prompt_token_ids=PROMPT)
    outputs: list[EngineCoreOutput] = side.run(leg(engine, decode_leg(request, uuid.uuid4().hex, handoff)))
    return outputs


Sides, Engines = tuple[Side, Side], tuple[SimulatedEngine, SimulatedEngine]


def test_a_partition_fails_the_pull_in_time(sides: Sides, engines: Engines) -> None:
    """No packet gets through: the leg ends with an error within the timeout, the engine lives, and holds nothing.
    Once the cable is back the same pair works again."""
    handoff = prefilled(sides[0], engines[0])
    sides[0].plug("down")
    began = time.monotonic()
    assert decoded(sides[1], engines[1], handoff)[-1].finish_reason is FinishReason.ERROR
    assert time.monotonic() - began < ANSWER_TIMEOUT_S + 3
    assert engines[1].state()["blocks_held"] == 0
    sides[0].plug("up")
    outputs = decoded(sides[1], engines[1], prefilled(sides[0], engines[0]))
    assert [token for output in outputs for token in output.new_token_ids] == answer(PROMPT, 5)


def test_a_reset_fails_the_pull_at_once(sides: Sides, engines: Engines) -> None:
    """Nobody listens there any more: an error without any wait."""
    handoff = prefilled(sides[0], engines[0])
    sides[0].run(_stop(engines[0]))
    began = time.monotonic()
    assert decoded(sides[1], engines[1], handoff)[-1].finish_reason is FinishReason.ERROR
    assert time.monotonic() - began < 2


def test_a_release_needs_no_other_engine(sides: Sides, engines: Engines) -> None:
    """Cut off from the decode pool, a prefill engine is still told by its worker, and frees the blocks at once."""
    handoff = prefilled(sides[0], engines[0])
    assert engines[0].state()["blocks_held"] > 0
    sides[0].plug("down")
    sides[0].run(engines[0].add(release_leg(handoff)))
    state = engines[0].state()
    assert (state["blocks_held"], state["handoffs"], state["leases_expired"]) == (0, 0, 0)


def test_what_nobody_releases_is_left_to_the_lease(sides: Sides, engines: Engines) -> None:
    """The last resort: such blocks are free when their lease has run out, and that is counted."""
    prefilled(sides[0], engines[0])
    assert engines[0].state()["blocks_held"] > 0
    deadline = time.monotonic() + LEASE_S + 5
    while engines[0].state()["blocks_held"] and time.monotonic() < deadline:
        time.sleep(0.1)
    state = engines[0].state()
    assert (state["blocks_held"], state["handoffs"], state["leases_expired"]) == (0, 0, 1)
