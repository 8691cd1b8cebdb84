"""The block cache of a simulated engine: content-addressed, reference-counted, least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

BlockKey = Hashable


def block_keys(tokens: Sequence[int], block_tokens: int, salt: Hashable = None) -> list[int]:
    """The keys of the full blocks of `tokens`: each is the hash of its tokens and of its parent's key."""
    keys: list[int] = []
    parent: BlockKey = salt
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        key = hash((parent, tuple(tokens[start : start + block_tokens])))
        keys.append(key)
        parent = key
    return keys


@dataclass
class BlockCache:
    """`capacity` blocks, each held by some requests or free; those that were filled can be hit, held or free.

    `on_removed` is called with blocks that can be hit no more.
    """

    capacity: int
    on_removed: Callable[[Sequence[BlockKey]], object] | None = None
    _held: dict[BlockKey, int] = field(default_factory=dict)
    _filled: set[BlockKey] = field(default_factory=set)  # of those that are held; all free ones are
    _free: OrderedDict[BlockKey, None] = field(default_factory=OrderedDict)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return len(self._held)

    def hits(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first `keys` are here, with their content."""
        for count, key in enumerate(keys):
            if key not in self._filled and key not in self._free:
                return count
        return len(keys)

    def hold(self, keys: Sequence[BlockKey]) -> bool:
        """Take a reference on every block of `keys`, making room as needed. All or nothing."""
        fresh = sum(key not in self._held for key in keys)
        if len(self._held) + fresh > self.capacity:
            return False
        for key in keys:
            if key in self._free:
                del self._free[key]
                self._filled.add(key)
            self._held[key] = self._held.get(key, 0) + 1
        self._evict()
        return True

    def fill(self, keys: Sequence[BlockKey]) -> tuple[BlockKey, ...]:
        """The content of these blocks, which somebody holds, is there. Returns those that could not be hit before."""
        stored = tuple(key for key in keys if key not in self._filled)
        self._filled.update(stored)
        return stored

    def release(self, keys: Sequence[BlockKey]) -> None:
        """Give back what `hold` took. Later blocks of a chain are evicted before earlier ones."""
        for key in reversed(keys):
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                if key in self._filled:
                    self._filled.remove(key)
                    self._free[key] = None

    def clear(self) -> bool:
        """Forget all free blocks; False, and nothing happens, while any block is held."""
        if self._held:
            return False
        self._tell_removed(list(self._free))
        self._free.clear()
        return True

    def _evict(self) -> None:
        removed: list[BlockKey] = []
        while len(self._held) + len(self._free) > self.capacity:
            removed.append(self._free.popitem(last=False)[0])
        self._tell_removed(removed)

    def _tell_removed(self, keys: list[BlockKey]) -> None:
        if self.on_removed is not None and keys:
            self.on_removed(keys)
