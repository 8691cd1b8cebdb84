"""The models on a node: each is fetched once, whoever asks, and is seen by others only when it is whole.

```
ROOT/KEY/           a model, complete; renamed into place, never changed afterwards
ROOT/.KEY.partial/  one that is being fetched, or was when its process was killed: the next one goes on with it
ROOT/.KEY.lock      held by the process that fetches it
ROOT/.lock          held while room is made
```
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USED = ".used"
"""A file beside a model's own whose time of change says when the model was last asked for."""


class CacheFull(Exception):
    """There is no room for a model, and nothing that may be removed.

    Attributes:
        needed, room: bytes.
    """

    def __init__(self, needed: int, room: int, keeps: tuple[str, ...]) -> None:
        super().__init__(needed, room, keeps)
        self.needed, self.room, self.keeps = needed, room, keeps

    def __str__(self) -> str:
        kept = ", ".join(self.keeps) or "nothing"
        return f"the model takes {self.needed} bytes, the cache has room for {self.room}; in use lately: {kept}"


@dataclass(frozen=True)
class ModelCache:
    """A directory of models, bounded in size.

    Attributes:
        root: on the node's own disk.
        max_bytes: what all models may take together; None for no bound.
        keep_s: a model that was asked for within this time is not removed to make room.
    """

    root: Path
    max_bytes: int | None = None
    keep_s: float = 7 * 24 * 3600.0

    def model(self, key: str, fill: Callable[[Path], None], size: Callable[[], int | None] = lambda: None) -> Path:
        """The directory of a model; `fill` fetches it where it is not there. Another process that does is awaited.

        Args:
            fill: puts the model into the given directory, which may hold what an earlier attempt left, and checks it.
            size: the model's bytes, where they can be known before it is fetched.

        Raises:
            CacheFull: when there is no room; whatever `fill` raises.
        """
        target = self.root / key
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / f".{key}.lock"):
            if not target.is_dir():
                if (known := size()) is not None:
                    with self.room(known, key):
                        pass  # what it takes is told again once it is here
                partial = self.root / f".{key}.partial"
                partial.mkdir(exist_ok=True)
                fill(partial)
                (partial / USED).touch()
                _flush(partial)
                try:
                    with self.room(bytes_in(partial), key):
                        partial.rename(target)
                except CacheFull:
                    shutil.rmtree(partial)
                    raise
            (target / USED).touch()
        return target

    @contextmanager
    def room(self, needed: int, key: str) -> Iterator[None]:
        """Room for `needed` bytes of a model, which nobody else takes until the block ends.

        For that go what fetches of other models left that were killed, then the models that nobody has asked for
        lately, the longest unused first.

        Raises:
            CacheFull: when there can't be room; then no model is removed.
        """
        with _locked(self.root / ".lock"):
            for doomed in self.root.glob(".*.doomed"):
                shutil.rmtree(doomed)
            if self.max_bytes is not None:
                self._make_room(self.max_bytes, needed, key)
            yield

    def _make_room(self, max_bytes: int, needed: int, key: str) -> None:
        partials = {path: bytes_in(path) for path in self.root.glob(".*.partial") if path.name != f".{key}.partial"}
        sizes = {model: bytes_in(model) for model in self.models()}
        room = max_bytes - sum(sizes.values()) - sum(partials.values())
        for partial, size in partials.items():
            if room >= needed:
                return
            with _locked(partial.with_suffix(".lock"), wait=False) as mine:
                if mine:
                    shutil.rmtree(partial)
                    room += size
        now = time.time()
        idle = [model for model in sizes if now - last_used(model) > self.keep_s]
        idle.sort(key=last_used)
        if room + sum(sizes[model] for model in idle) < needed:
            raise CacheFull(needed, room, tuple(sorted(model.name for model in sizes if model not in idle)))
        while room < needed:
            model = idle.pop(0)
            doomed = self.root / f".{model.name}.doomed"
            model.rename(doomed)  # at once out of sight: a model is whole or not there
            shutil.rmtree(doomed)
            room += sizes[model]

    def models(self) -> list[Path]:
        """The complete models."""
        return [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def bytes_in(directory: Path) -> int:
    """The size of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def last_used(model: Path) -> float:
    """When a model was last asked for, in seconds since the epoch."""
    return (model / USED).stat().st_mtime


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes, or tell that another one does; the kernel lets it go when this one dies.

    A record lock, not flock: processes that the download forks would inherit the latter and outlive a killed parent.
    """
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _flush(directory: Path) -> None:
    """Put the files on the disk before the name that says they are whole."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
