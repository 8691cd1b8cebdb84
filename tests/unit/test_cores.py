"""Engines on one machine get cores of their own, where there are enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.cores import BIND_ENV, allowed_cores, claim_cores
from kv_transfer.settings import EngineSettings
from kv_transfer.vllm_engine import _binding
from runtime.config_file import parse

CLAIM = """
import sys
from pathlib import Path
from kv_transfer.cores import claim_cores
print(claim_cores(int(sys.argv[2]), range(8), Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


class Engine:
    """Another process that claims cores and keeps them until it ends."""

    def __init__(self, folder: Path, count: int) -> None:
        command = [sys.executable, "-c", CLAIM, str(folder), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.cores = self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate()


def test_no_core_twice(tmp_path: Path) -> None:
    """Two engines share the cores; a third one gets none rather than some of theirs, until one of them has ended."""
    first, second = Engine(tmp_path, 3), Engine(tmp_path, 4)
    third = Engine(tmp_path, 2)
    first.end()
    fourth = Engine(tmp_path, 3)
    for engine in (second, third, fourth):
        engine.end()
    assert [engine.cores for engine in (first, second, third, fourth)] == [
        "[0, 1, 2]",
        "[3, 4, 5, 6]",
        "[]",
        "[0, 1, 2]",
    ]


def test_nothing_stays_claimed_by_half_a_claim(tmp_path: Path) -> None:
    """Too many: none is taken, and all of them can be had afterwards."""
    assert claim_cores(3, [0, 1], tmp_path) == []
    assert claim_cores(2, [0, 1], tmp_path) == [0, 1]


def test_cores_that_may_be_used() -> None:
    """At least one, each once."""
    cores = allowed_cores()
    assert cores
    assert len(set(cores)) == len(cores)


@pytest.mark.parametrize(
    ("machine", "settings", "threads", "pinned"),
    [
        (2, {}, "1", 0),
        (4, {}, "2", 0),
        (8, {}, "3", 3),
        (16, {}, "7", 7),
        (16, {"prefill": {"replicas": 3}}, "3", 3),
        (16, {"prefill": {"threads": 4}}, "4", 4),
        (2, {"prefill": {"threads": 2}}, "2", 0),
        (16, {"prefill": {"threads": 16}}, "16", 0),
    ],
)
def test_threads_of_an_engine(
    monkeypatch: pytest.MonkeyPatch, machine: int, settings: dict[str, object], threads: str, pinned: int
) -> None:
    """An even share of the machine; of a large one a core is left to the rest of the engine, and threads are pinned."""
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    engine = parse({"model": "/m", **settings}).engine_settings("prefill")
    assert engine.env["OMP_NUM_THREADS"] == threads
    assert engine.pinned_threads == pinned


@pytest.mark.parametrize(
    ("claimed", "args", "env", "expected"),
    [
        ([2, 3, 4], {}, {}, {BIND_ENV: "2,3,4"}),
        ([2, 3, 4, 5, 6, 7], {"tensor_parallel_size": 2}, {}, {BIND_ENV: "2,3,4|5,6,7"}),
        ([], {}, {}, {}),
        ([2, 3, 4], {}, {BIND_ENV: "0-2"}, {}),
    ],
)
def test_binding(
    monkeypatch: pytest.MonkeyPatch,
    claimed: list[int],
    args: dict[str, int],
    env: dict[str, str],
    expected: dict[str, str],
) -> None:
    """A list for each model worker; none where cores are short, or where the user has bound them already."""
    monkeypatch.setattr("kv_transfer.vllm_engine.claim_cores", lambda count: claimed)
    settings = EngineSettings(role="decode", model="/m", args=args, env=env, pinned_threads=3)  # type: ignore[call-arg]
    assert _binding(settings) == expected
