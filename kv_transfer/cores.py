"""Cores of this machine, shared out among the CPU engines on it: each engine's threads get cores of their own.

A claim is a lock on a file for each core, so it needs no coordinator: it holds between engines of any application of
this user, and ends with the process that made it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"
"""Where vLLM reads the cores of its model workers: lists such as `0,1|2,3`, a worker each; `nobind` binds none."""

_held: list[int] = []  # locked files of this process: open until it ends


def claim_cores(count: int, cores: Sequence[int] | None = None, folder: Path | None = None) -> list[int]:
    """Claim `count` cores for this process, for as long as it lives.

    Args:
        cores: logical CPUs to choose from, best first; by default those that this process may run on.
        folder: where the locks are; by default one for each user.

    Returns:
        The claimed logical CPUs, or none where fewer than `count` are free.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"baton-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    claimed: dict[int, int] = {}  # core -> locked file
    for core in allowed_cores() if cores is None else cores:
        if len(claimed) == count:
            break
        file = os.open(folder / str(core), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed[core] = file
        except BlockingIOError:
            os.close(file)
    if len(claimed) < count:
        for file in claimed.values():
            os.close(file)
        return []
    _held.extend(claimed.values())
    return sorted(claimed)


def allowed_cores() -> list[int]:
    """Logical CPUs that this process may run on; a second thread of a physical core comes after all first ones."""
    return sorted(os.sched_getaffinity(0), key=lambda core: (_place_among_siblings(core), core))


def _place_among_siblings(core: int) -> int:
    """0 for the first hardware thread of a physical core, or where that can't be told; 1 for the second."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    with suppress(OSError, ValueError):
        siblings: list[int] = []
        for part in path.read_text().split(","):
            first, _, last = part.strip().partition("-")
            siblings += range(int(first), int(last or first) + 1)
        return siblings.index(core)
    return 0
