"""A Ray node in a predictor's pod that offers nothing: a driver needs a node, and work must not land on this one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from runtime.errors import BatonError
from runtime.grace import NODE_VARIABLE

logger = logging.getLogger("baton.ray_node")

STARTED = "Ray runtime started"
PAUSE_S = 2.0
STOP_S = 10.0
"""How long the node may take to leave. With the goodbye to the keeper it fits into what a pod has for its end."""

STORE_BYTES = 256 * 2**20
"""Ray would take a third of the pod's memory, more than its /dev/shm, for objects that Baton does not make."""


class StartFailed(BatonError):
    """A predictor's application or its cluster can't be had; the message says why."""


class RayNode:
    """`ray start --block` as a child process, until `stop`.

    Args:
        address: `HOST:PORT` of the cluster's head.
        timeout_s: how long the head may take to appear; it may be starting beside this predictor.
        given_up: set when nobody waits for the node any more.

    Raises:
        StartFailed: when the cluster can't be joined in that time, or it was given up.
    """

    def __init__(self, address: str, timeout_s: float = 300.0, given_up: threading.Event | None = None) -> None:
        self._given_up = given_up or threading.Event()
        deadline = time.monotonic() + timeout_s
        while not self._start(address, deadline):
            if time.monotonic() > deadline:
                raise StartFailed(f"no Ray cluster at {address} for {timeout_s:g} s: {' / '.join(self._told)}")
            if self._given_up.wait(PAUSE_S):
                raise StartFailed(f"stopped before there was a Ray cluster at {address}")

    def _start(self, address: str, deadline: float) -> bool:
        self._told: deque[str] = deque(maxlen=5)
        self._settled = threading.Event()
        self._up = False
        command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--block"]
        command += ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        self._process = subprocess.Popen(  # noqa: S603  # our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Nothing runs here that a drain could move.
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {NODE_VARIABLE: "0"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = max(time.monotonic() + PAUSE_S, deadline)
        while not self._settled.wait(0.2):  # it gives up by itself where nobody answers
            if self._given_up.is_set() or time.monotonic() > deadline:
                break
        if not self._up:
            self.stop()
        return self._up

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.strip():
                    self._told.append(line.strip())
                if STARTED in line:
                    self._up = True
                    self._settled.set()
        self._settled.set()

    def stop(self) -> None:
        """Leave the cluster."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_S)
