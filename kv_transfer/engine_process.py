"""What Baton does inside each of vLLM's own processes, which load the `vllm.general_plugins` entry points.

*End with the replica.* vLLM's engine core is a grandchild of the Serve replica and its model workers are one generation
further down: after a SIGKILL of the replica both would stay behind with their memory. A thread ends the process once
its parent is no longer the one that started it. (Not PR_SET_PDEATHSIG: that fires when the parent's *thread* ends, and
engines start in a worker thread.)

*Leave cores to others* where engines share them (`kv_transfer.shared_cores`).

*Take up grammars in the middle* (`kv_transfer.grammar`), *release own blocks* (`kv_transfer.own_release`), and *sample
with a seed on a CPU* (`kv_transfer.cpu_sampling`).
"""

from __future__ import annotations

import os
import threading
import time

from kv_transfer import cpu_sampling, grammar, own_release, shared_cores

WATCH_ENV = "BATON_WATCH_PARENT"
SPIN_ENV = "BATON_SPIN_S"
POLL_S = 0.5


def install() -> None:
    """Prepare this process if it belongs to one of Baton's engines and is not the replica itself."""
    owner = os.environ.get(WATCH_ENV)
    if owner is None or owner == str(os.getpid()):
        return
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="baton-parent-watch", daemon=True).start()
    grammar.install()
    own_release.install()
    cpu_sampling.install()
    if spin := os.environ.get(SPIN_ENV):
        shared_cores.install(float(spin))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
