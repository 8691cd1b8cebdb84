"""End an engine process whose parent has gone.

vLLM's engine core is a grandchild of the Serve replica and its model workers are one generation further down: after a
SIGKILL of the replica both would stay behind with their memory. vLLM loads the `vllm.general_plugins` entry points in
each of its processes; ours starts a thread there that ends the process once its parent is no longer the one that
started it. (Not PR_SET_PDEATHSIG: that fires when the parent's *thread* ends, and engines start in a worker thread.)
"""

from __future__ import annotations

import os
import threading
import time

WATCH_ENV = "BATON_WATCH_PARENT"
POLL_S = 0.5


def install() -> None:
    """Watch the parent if this process belongs to one of Baton's engines and is not the replica itself."""
    owner = os.environ.get(WATCH_ENV)
    if owner is None or owner == str(os.getpid()):
        return
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="baton-parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
