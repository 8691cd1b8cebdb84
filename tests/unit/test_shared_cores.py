"""Engines that have nothing to do leave their cores to others: with vLLM's own queue and a real NIXL agent."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config
from vllm.platforms.cpu import CpuPlatform

from kv_transfer import shared_cores
from kv_transfer.nixl import transport_env
from kv_transfer.settings import TransportSettings

SPIN_S = 0.002


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process like that of an engine on a CPU."""
    for name, value in transport_env(TransportSettings(host="127.0.0.1"), "127.0.0.1", 0).items():  # type: ignore[call-arg]
        monkeypatch.setenv(name, value)
    bindings = sys.modules[NixlWrapper.__module__].nixlBind
    for owner, name in (
        (shm_broadcast.SpinCondition.__init__, "__defaults__"),
        (shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS"),
        (bindings, "nixlAgent"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    monkeypatch.setattr(CpuPlatform, "discover_numa_topology", CpuPlatform.discover_numa_topology)
    shared_cores.install(SPIN_S)
    shared_cores.install(SPIN_S)  # twice does no harm
    yield


@pytest.mark.usefixtures("shared")
def test_an_idle_agent_takes_no_core() -> None:
    """Its progress thread sleeps. The time is that of all threads of this process."""
    agent = NixlWrapper("idle", nixl_agent_config(num_threads=4))
    began = time.process_time()
    time.sleep(0.5)
    took = time.process_time() - began
    del agent
    assert took < 0.2


@pytest.mark.usefixtures("shared")
def test_a_lost_wake_up_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that sleeps finds what was written though nobody told it."""
    queue = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
    reader = shm_broadcast.MessageQueue.create_from_handle(queue.export_handle(), 0)
    monkeypatch.setattr(shm_broadcast.SpinCondition, "notify", lambda self: None)
    written: list[float] = []

    def write() -> None:
        written.append(time.monotonic())
        queue.enqueue("step")

    late = threading.Timer(0.2, write)  # the reader sleeps by then
    late.start()
    assert reader.dequeue(timeout=4) == "step"
    assert time.monotonic() - written[0] < 1
    late.join()


@pytest.mark.usefixtures("shared")
def test_no_core_is_reserved() -> None:
    """The NIXL connector moves its thread to the cores that this names, and to none where there are none."""
    assert CpuPlatform.discover_numa_topology() == []
