"""The engines of both pools share the cores of this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import Server, marked

IDLE_S = 3.0


@pytest.fixture(scope="module")
def processes(server: Server) -> list[int]:
    """The engine cores and their model workers."""
    found = [pid for pid, command in marked(server.mark).items() if command.startswith("VLLM::")]
    assert len(found) == 4
    return found


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed, in all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_engine_is_held_on_a_core_of_another(processes: list[int]) -> None:
    """Where no core was claimed for an engine, its thread that computes may run on all of them."""
    assert [os.sched_getaffinity(pid) for pid in processes] == [os.sched_getaffinity(0)] * len(processes)


def test_idle_engines_take_no_core(processes: list[int]) -> None:
    """Nobody polls without a pause, neither vLLM nor NIXL."""
    before = [cpu_s(pid) for pid in processes]
    time.sleep(IDLE_S)
    took = [cpu_s(pid) - then for pid, then in zip(processes, before, strict=True)]
    assert max(took) < 0.2 * IDLE_S
