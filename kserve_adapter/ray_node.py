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

logger = logging.getLogger("baton.ray_node")

STARTED = "Ray runtime started"
PAUSE_S, STOP_S = 2.0, 30.0


class StartFailed(BatonError):
    """A predictor's application or its cluster can't be had; the message says why."""


class RayNode:
    """`ray start --block` as a child process, until `stop`.

    Args:
        address: `HOST:PORT` of the cluster's head.
        timeout_s: how long the head may take to appear; it may be starting beside this predictor.

    Raises:
        StartFailed: when the cluster can't be joined in that time.
    """

    def __init__(self, address: str, timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._start(address, deadline):
            if time.monotonic() > deadline:
                raise StartFailed(f"no Ray cluster at {address} for {timeout_s:g} s: {' / '.join(self._told)}")
            time.sleep(PAUSE_S)

    def _start(self, address: str, deadline: float) -> bool:
        self._told: deque[str] = deque(maxlen=5)
        self._settled = threading.Event()
        self._up = False
        command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--block"]
        command += ["--num-cpus=0", "--num-gpus=0", "--disable-usage-stats"]
        self._process = subprocess.Popen(  # noqa: S603  # our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._settled.wait(max(PAUSE_S, deadline - time.monotonic()))  # it gives up by itself where nobody answers
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
