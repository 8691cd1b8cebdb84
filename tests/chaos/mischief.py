"""What goes wrong, by seed, on a running server with simulated engines."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from urllib.parse import urlsplit

import psutil

from tests.conftest import Server
from tests.pools import ROLES, Pools

LONG_STOP_S = 14.0
"""Longer than the watchdogs between front ends and workers (10 s)."""


class Mischief:
    """Each method harms one process; `done` counts what was done, `front_end_deaths` when."""

    def __init__(self, server: Server, pools: Pools, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.front_end_deaths: list[float] = []
        self._server, self._pools, self._chance = server, pools, random.Random(seed)
        self._timers: list[threading.Timer] = []
        self._spared_pids: frozenset[int] = frozenset()
        self._spared_engines: frozenset[str] = frozenset()

    def spare(self, pids: set[int], engines: set[str]) -> None:
        """Never kill these processes, nor harm these engine cores."""
        self._spared_pids, self._spared_engines = frozenset(pids), frozenset(engines)

    @property
    def kills(self) -> int:
        """Processes and engine cores that were ended."""
        return sum(self.done[kind] for kind in ("replica", "engine core", "hang", "front end"))

    def kill_replica(self, role: str) -> None:
        """SIGKILL of a worker's process."""
        if pids := self._victims(role):
            self._signal(self._chance.choice(pids), signal.SIGKILL)
            self.done["replica"] += 1

    def kill_front_end(self) -> None:
        """SIGKILL of a front end, unless it is the only one that listens."""
        listening = _listening(urlsplit(self._server.url).port).intersection(self._server.pids("front-end"))
        pids = [pid for pid in self._victims("front-end") if pid in listening]
        if pids and len(listening) > 1:
            self.front_end_deaths.append(time.monotonic())
            self._signal(self._chance.choice(pids), signal.SIGKILL)
            self.done["front end"] += 1

    def fault(self, role: str, kind: str, name: str, value: object) -> None:
        """Have an engine core of a role misbehave."""
        if engines := sorted(set(self._pools.engines(role)) - self._spared_engines):
            with suppress(Exception):  # it may have died since it was announced, and may die of the fault
                self._pools.call(role, self._chance.choice(engines), "inject_fault", name, value)
                self.done[kind] += 1

    def stop_replica(self, role: str, for_s: float) -> None:
        """SIGSTOP of a worker's process, and SIGCONT after a while."""
        if pids := self._victims(role):
            pid = self._chance.choice(pids)
            self._signal(pid, signal.SIGSTOP)
            timer = threading.Timer(for_s, self._signal, (pid, signal.SIGCONT))
            timer.start()
            self._timers.append(timer)
            self.done["long stop" if for_s >= LONG_STOP_S else "short stop"] += 1

    def something(self) -> None:
        """One harm, chosen by the seed."""
        role = self._chance.choice(ROLES)
        what = self._chance.random()
        if what < 0.5:
            self.kill_replica(role)
        elif what < 0.7:
            self.fault(role, "engine core", "dead", True)
        elif what < 0.76:
            self.fault(role, "hang", "hang", True)
        elif what < 0.84:
            self.fault("decode", "failing pulls", "fail_pulls", self._chance.randint(1, 4))
        elif what < 0.92:
            self.stop_replica(role, self._chance.uniform(0.1, 3))
        elif what < 0.95:
            self.stop_replica(role, LONG_STOP_S)
        else:
            self.kill_front_end()

    def over(self) -> None:
        """Wait until every process that was stopped goes on."""
        for timer in self._timers:
            timer.join()

    def _victims(self, deployment: str) -> list[int]:
        return [pid for pid in self._server.pids(deployment) if pid not in self._spared_pids]

    def _signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _listening(port: int | None) -> set[int | None]:
    """Who listens. A front end that is not up yet is there as a process, but no client can connect to it."""
    sockets = psutil.net_connections("tcp")
    return {s.pid for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port == port}
