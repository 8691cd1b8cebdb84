"""Let engines share the cores of a machine without a GPU: who has nothing to do there leaves its core to others.

vLLM and NIXL expect an engine to have a machine with cores to spare. Four things follow from that in vLLM 0.32 and NIXL
1.5, which in Baton's engines on CPUs are otherwise (docs/decisions/012):

- A model worker polls for its next step for a whole second before it sleeps. Here it does for `spin_s`.
- One that sleeps is woken by a message which can be lost, and looks by itself every 5 s only. Here after `RECHECK_MS`.
- NIXL's progress thread polls without a pause. Here it sleeps until there is an event, `NIXL_SLEEP_US` at most.
- The NIXL connector moves the thread that computes to the last core of the machine, and so that of every engine.
  Here it stays where it is.
"""

from __future__ import annotations

import sys
from typing import Any

RECHECK_MS = 10
NIXL_SLEEP_US = 1000
"""NIXL counts in whole milliseconds. Some of UCX's transports have no events, and are progressed this often."""


def install(spin_s: float) -> None:
    """Change vLLM's and NIXL's ways in this process, before they start."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms.cpu import CpuPlatform

    shm_broadcast.SpinCondition.__init__.__defaults__ = (spin_s,)  # of `busy_loop_s`, its only default
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = RECHECK_MS
    CpuPlatform.discover_numa_topology = classmethod(lambda cls: [])  # asked for cores to reserve for transfers
    _let_nixl_sleep()


def _let_nixl_sleep() -> None:
    from vllm.distributed.nixl_utils import NixlWrapper

    bindings = sys.modules[NixlWrapper.__module__].nixlBind
    make = bindings.nixlAgent

    def make_sleeping(name: str, config: Any) -> Any:
        config.pthrDelay = NIXL_SLEEP_US
        return make(name, config)

    if make.__name__ != make_sleeping.__name__:  # else it is done already
        bindings.nixlAgent = make_sleeping
