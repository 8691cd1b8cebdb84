"""Steady load with a kill every so often: what becomes of memory, file descriptors and requests. `make soak`.

`BATON_SOAK_MINUTES`, `BATON_SOAK_KILL_EVERY_S` and `BATON_CHAOS_SEED` choose the run. The oldest front end and the
oldest worker of each pool are spared, so that there are processes whose memory can be followed all the way.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.load import Load
from tests.chaos.mischief import Mischief
from tests.conftest import ROOT, Server, baton_serve, marked, wait_for
from tests.pools import ROLES, Pools

MINUTES = float(os.environ.get("BATON_SOAK_MINUTES", "20"))
KILL_EVERY_S = float(os.environ.get("BATON_SOAK_KILL_EVERY_S", "20"))
SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))
CLIENTS, PAUSE_S = 6, 0.5
SAMPLE_EVERY_S = 5.0
WARM_UP = 0.15
"""Share of the run that is left out of the slopes: caches and pools fill."""

LOG_MONITOR = "log_monitor.py"
"""Ray's own: it keeps the logs of dead workers open, 200 at most (`RAY_LOG_MONITOR_MAX_OPEN_FILES`)."""

SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": 2},
    "decode": {"replicas": 2},
    "transport": {"lease_s": 600},
    "limits": {"retry_budget": 50},
}
SETTINGS["front_end"] = {**SETTINGS["front_end"], "replicas": 2}


@dataclass
class Life:
    """What was seen of one process: seconds since the start, resident bytes, open file descriptors."""

    name: str
    at_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def after(self, warm_s: float) -> Life:
        """The same without what came before."""
        kept = [i for i, at in enumerate(self.at_s) if at >= warm_s]
        return Life(
            self.name,
            [self.at_s[i] for i in kept],
            [self.resident[i] for i in kept],
            [self.descriptors[i] for i in kept],
        )

    def slope_mb_per_h(self) -> float:
        """Growth of the resident memory by least squares."""
        return statistics.linear_regression(self.at_s, self.resident).slope * 3600 / 1e6


class Sampler:
    """Watches every process of a server."""

    def __init__(self, server: Server) -> None:
        self.lives: dict[int, Life] = {}
        self._server, self._began, self._over = server, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_EVERY_S):
            for pid, command in marked(self._server.mark).items():
                try:
                    process = psutil.Process(pid)
                    resident, descriptors = process.memory_info().rss, process.num_fds()
                except psutil.Error:
                    continue  # it has just ended
                life = self.lives.setdefault(pid, Life(_name(command)))
                life.at_s.append(time.monotonic() - self._began)
                life.resident.append(resident)
                life.descriptors.append(descriptors)


class Reaper:
    """A kill every so often, among those that are not spared."""

    def __init__(self, server: Server, pools: Pools) -> None:
        self.mischief = Mischief(server, pools, SEED)
        self.mischief.spare(
            pids={server.pids(name)[0] for name in (*ROLES, "front-end")},
            engines={engine for role in ROLES for engine in pools.engines(role)},
        )
        self._chance = random.Random(SEED)

    def kill(self) -> None:
        """The next kill: mostly of a worker's process or engine core, every fifth of a front end."""
        before = self.mischief.kills
        while self.mischief.kills == before:
            role = self._chance.choice(ROLES)
            what = self._chance.random()
            if what < 0.2:
                self.mischief.kill_front_end()
            elif what < 0.4:
                self.mischief.fault(role, "engine core", "dead", True)
            else:
                self.mischief.kill_replica(role)
            time.sleep(0.1)


def main() -> int:
    """Run, print what was seen, and return 1 if anything was not as promised."""
    path = Path(tempfile.mkdtemp()) / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        pools = Pools(server)
        load = Load(server.url, SEED, CLIENTS, PAUSE_S)
        sampler, reaper = Sampler(server), Reaper(server, pools)
        began = time.monotonic()
        load.start()
        while (passed := time.monotonic() - began) < MINUTES * 60:
            time.sleep(max(0.0, KILL_EVERY_S - passed % KILL_EVERY_S))
            reaper.kill()
        load.stop()
        quiet = wait_for(pools.quiet, 5)
        sampler.stop()
        expired = pools.leases_expired()
        pools.close()  # or Ray would end this process a minute after its cluster
    failures = load.unexcused(reaper.mischief.front_end_deaths)
    print(f"seed {SEED}: {MINUTES:g} min, kills {dict(reaper.mischief.done)}, requests {dict(load.counts())}")
    print(f"not explained by a front end's death: {len(failures)}; quiet after 5 s: {quiet}; leases expired: {expired}")
    for failure in failures[:20]:
        print(f"  {failure}")
    problems = report(sampler.lives, MINUTES * 60)
    return 1 if failures or problems or not quiet or expired else 0


def report(lives: dict[int, Life], lasted_s: float) -> list[str]:
    """Print a table of the processes that lived nearly all the time, and return those whose descriptors grew."""
    warm_s, grown = WARM_UP * lasted_s, []
    print("\n| process | resident, MB: warm | end | highest | slope, MB/h | descriptors: warm | end |")
    print("|---|---|---|---|---|---|---|")
    for life in sorted(lives.values(), key=lambda life: life.name):
        if life.at_s[0] > warm_s or life.at_s[-1] < 0.95 * lasted_s:
            continue
        kept = life.after(warm_s)
        memory = [f"{value / 1e6:.0f}" for value in (kept.resident[0], kept.resident[-1], max(kept.resident))]
        print(
            f"| {life.name} | {' | '.join(memory)} | {kept.slope_mb_per_h():+.1f} "
            f"| {kept.descriptors[0]} | {kept.descriptors[-1]} |"
        )
        if kept.descriptors[-1] > kept.descriptors[0] + 20 and life.name != LOG_MONITOR:
            grown.append(life.name)
    return grown


def _name(command: str) -> str:
    name = command.split()[0] if command else "?"
    if name.startswith("ray::ServeReplica"):
        return name.rsplit(":", 1)[1]
    if "baton serve" in command.replace("/", " "):
        return "baton serve"
    script = next((word for word in command.split() if word.endswith(".py")), name)
    return (script if name.rsplit("/", 1)[-1].startswith("python") else name).rsplit("/", 1)[-1]


if __name__ == "__main__":
    sys.exit(main())
