"""A predictor's own node of the Ray cluster, with a stand-in for the `ray` command."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kserve_adapter import ray_node
from kserve_adapter.ray_node import RayNode, StartFailed
from runtime.grace import NODE_VARIABLE


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ray` be a shell script."""
    command = folder / "ray"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setattr(ray_node.sys, "executable", str(folder / "python"))
    monkeypatch.setattr(ray_node, "PAUSE_S", 0.1)


def test_a_head_that_comes_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused twice, up at the third attempt, and ended by `stop`."""
    count = tmp_path / "count"
    script = f'echo x >> {count}; [ $(wc -l < {count}) -lt 3 ] && exit 1; echo "Ray runtime started."; exec sleep 100'
    stand_in(tmp_path, script, monkeypatch)
    node = RayNode("head:6379", timeout_s=30)
    assert count.read_text().count("x") == 3
    node.stop()
    assert node._process.poll() is not None


def test_a_slow_start_is_not_taken_for_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that takes its time is left alone: one attempt."""
    count = tmp_path / "count"
    stand_in(tmp_path, f'echo x >> {count}; sleep 2; echo "Ray runtime started."; exec sleep 100', monkeypatch)
    RayNode("head:6379", timeout_s=30).stop()
    assert count.read_text().count("x") == 1


def test_the_node_leaves_without_a_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs there: Ray must not wait for what it would move, whatever the pod's own setting is."""
    monkeypatch.setenv(NODE_VARIABLE, "250")
    script = f'echo "${NODE_VARIABLE}" > {tmp_path}/drain; echo "Ray runtime started."; exec sleep 100'
    stand_in(tmp_path, script, monkeypatch)
    RayNode("head:6379", timeout_s=30).stop()
    assert (tmp_path / "drain").read_text() == "0\n"


def test_no_head_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after the time, with the command's last words."""
    stand_in(tmp_path, "echo nobody there; exit 1", monkeypatch)
    with pytest.raises(StartFailed, match="nobody there"):
        RayNode("head:6379", timeout_s=0.5)


def test_a_predictor_that_is_told_to_stop_waits_for_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up in the middle of an attempt: over at once, and the command is ended."""
    stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100", monkeypatch)
    given_up = threading.Event()
    threading.Timer(0.5, given_up.set).start()
    started = time.monotonic()
    with pytest.raises(StartFailed, match="stopped before"):
        RayNode("head:6379", timeout_s=60, given_up=given_up)
    assert time.monotonic() - started < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
