"""Who holds which KV blocks: the prefix index that a front end keeps, fed by the workers' KV events.

What a block is called here, and why not by its engine's hash: `kv_transfer.block_keys`.

*Memory.* A set of holders is an int with a bit for each worker, shared by neighbouring blocks of a chain, and each
worker has a dict from short engine hashes to keys: 150 to 200 bytes for a block on one worker. `max_entries` bounds
the pairs of block and worker; beyond it goes what was not used for long (two generations; use is a request that is
routed to it, or news of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.block_keys import EngineHash, StoredBlocks, short, stored_keys

_EVERYBODY = -1

_WALKED = 8
"""So many blocks at the start of a prompt are looked at one by one; see `PrefixIndex.match`."""


@dataclass(eq=False)
class _Worker:
    """What the index keeps for one worker."""

    slot: int
    bit: int  # the worker in a set of holders; one object for all of its blocks
    keys: dict[int, int | tuple[int, ...]] = field(default_factory=dict)  # short engine hash -> its key or keys
    copies: dict[int, int] = field(default_factory=dict)  # further copies of a block in the engine: rare
    given_up: int = 0  # blocks that the index has evicted and the worker still has


class Match(Mapping[str, int]):
    """How many tokens of one prompt, from its start, each worker holds. Iterates the workers with most first.

    A mapping that is worked out on demand: a system prompt can be on a thousand workers of which nobody asks. Good
    until the index changes.
    """

    __slots__ = ("_levels", "_names", "_workers")

    def __init__(self, levels: list[tuple[int, int]], workers: Mapping[str, _Worker], names: Sequence[str]) -> None:
        self._levels = levels  # (tokens, set of those who hold so many), most tokens first
        self._workers = workers
        self._names = names  # by slot

    def __getitem__(self, worker: str) -> int:
        tokens = self.get(worker)
        if tokens is None:
            raise KeyError(worker)
        return int(tokens)

    def get(self, worker: str, default: Any = None) -> Any:
        """As of any mapping; without an exception for each worker that holds nothing."""
        known = self._workers.get(worker)
        if known is not None:
            bit = known.bit
            for tokens, holders in self._levels:
                if holders & bit:
                    return tokens
        return default

    def __iter__(self) -> Iterator[str]:
        for _, holders in self._levels:
            for slot in _slots(holders):
                yield self._names[slot]

    def __len__(self) -> int:
        return sum(holders.bit_count() for _, holders in self._levels)


class PrefixIndex:
    """Which worker holds which blocks. Not thread-safe: one event loop feeds and asks it.

    Args:
        block_tokens: tokens in a block of the index. Engines' block sizes are multiples of it.
        max_entries: most pairs of block and worker.
        predicted_life_s: a predicted block is forgotten after this long, or twice that at most.
    """

    def __init__(self, block_tokens: int, max_entries: int = 2_000_000, predicted_life_s: float = 10.0) -> None:
        self.block_tokens = block_tokens
        self.skipped = 0  # engine blocks that could not be placed: unknown parent, odd block size
        self._max_entries = max_entries
        self._life_s = predicted_life_s
        self._entries = 0
        self._young: dict[int, int] = {}  # key -> set of holders; used since the last turn
        self._old: dict[int, int] = {}  # the others: evicted first
        self._workers: dict[str, _Worker] = {}
        self._names: list[str] = []  # of the workers, by slot; "" is a free slot
        self._predicted: dict[int, int] = {}
        self._predicted_before: dict[int, int] = {}
        self._turned_at = 0.0  # when the predictions were turned, on the caller's clock

    def __len__(self) -> int:
        """Pairs of block and worker, without predictions."""
        return self._entries

    def add(self, worker: str, stored: StoredBlocks) -> None:
        """Note blocks that a worker has from now on. Blocks that can't be placed are counted and skipped."""
        known = self._worker(worker)
        keys = self._keys(known, stored)
        if keys is None:
            self.skipped += len(stored.hashes)
            return
        each = stored.block_tokens // self.block_tokens
        for place, engine_hash in enumerate(stored.hashes):
            name = short(engine_hash)
            if name in known.keys:
                known.copies[name] = known.copies.get(name, 0) + 1
            else:
                known.keys[name] = keys[place] if each == 1 else tuple(keys[place * each : (place + 1) * each])
        self._hold(known.bit, keys)
        self._evict()

    def remove(self, worker: str, hashes: Sequence[EngineHash]) -> None:
        """Note blocks that a worker has no more. An engine can hold two copies of a block: the last one counts."""
        known = self._workers.get(worker)
        if known is None:
            return
        for name in map(short, hashes):
            if copies := known.copies.pop(name, 0):
                if copies > 1:
                    known.copies[name] = copies - 1
            elif (keys := known.keys.pop(name, None)) is not None:
                self._drop(known, keys)

    def clear(self, worker: str) -> None:
        """Forget what a worker holds; the worker itself is still there."""
        known = self._workers.get(worker)
        if known is None:
            return
        for keys in known.keys.values():
            self._drop(known, keys)
        known.keys, known.copies, known.given_up = {}, {}, 0
        for predicted in (self._predicted, self._predicted_before):
            for key in [key for key, holders in predicted.items() if holders & known.bit]:
                _without(predicted, key, known.bit)

    def forget(self, worker: str) -> None:
        """Forget a worker that is gone."""
        self.clear(worker)
        if known := self._workers.pop(worker, None):
            self._names[known.slot] = ""

    def predict(self, worker: str, keys: Sequence[int], now: float) -> None:
        """Expect a worker to hold these blocks soon: a request was routed to it. News of them takes over.

        Args:
            now: seconds on a monotonic clock, the same as for `match`.
        """
        self._turn_predictions(now)
        _join(self._predicted, keys, self._worker(worker).bit)
        self._use(keys)

    def match(self, keys: Sequence[int], now: float) -> Match:
        """What each worker holds, or will hold by prediction, of the prompt with these keys.

        Holders get fewer along a prompt, for engines give up later blocks of a chain before earlier ones, and nearly
        always so does this index. A worker that holds two blocks is therefore taken to hold those between, and a prompt
        of n blocks costs about log n lookups for each length that is held. The first few blocks, which engines with a
        sliding window give up first, are all looked at. A worker with a hole further on may be said to hold more than
        it does, never less: it then gets a request that it has to read more of.
        """
        self._turn_predictions(now)
        young, old = self._young.get, self._old.get
        soon, soon_before = self._predicted.get, self._predicted_before.get
        levels: list[tuple[int, int]] = []
        held, alive = 0, _EVERYBODY  # so many blocks are held by all of these
        ahead = [(len(keys), 0)]  # blocks further on that were looked at, the nearest last, and their holders
        while alive:
            place, holders = ahead.pop()
            if holders & alive != alive:
                while held < place:
                    middle = held if held < _WALKED else (held + place) // 2
                    key = keys[middle]
                    found = young(key) or old(key, 0)
                    if found & alive != alive:
                        found |= soon(key, 0) | soon_before(key, 0)
                    if found & alive == alive:
                        held = middle + 1
                    else:
                        ahead.append((place, holders))
                        place, holders = middle, found
                if held:
                    levels.append((held * self.block_tokens, alive & ~holders))
                alive &= holders
            held = place + 1
        levels.reverse()
        return Match(levels, self._workers, self._names)

    def _worker(self, name: str) -> _Worker:
        if name not in self._workers:
            if "" in self._names:
                slot = self._names.index("")
                self._names[slot] = name
            else:
                slot = len(self._names)
                self._names.append(name)
            self._workers[name] = _Worker(slot, 1 << slot)
        return self._workers[name]

    def _keys(self, worker: _Worker, stored: StoredBlocks) -> list[int] | None:
        """The keys of these blocks, or None when they can't be told."""
        if stored.parent is None:
            return stored_keys(stored, None, self.block_tokens)
        parent = worker.keys.get(short(stored.parent))
        if parent is None:
            return None
        return stored_keys(stored, parent[-1] if isinstance(parent, tuple) else parent, self.block_tokens)

    def _hold(self, bit: int, keys: Sequence[int]) -> None:
        """Add a holder; what is used moves to the young."""
        self._use(keys)
        self._entries += _join(self._young, keys, bit)

    def _use(self, keys: Sequence[int]) -> None:
        for key in filter(self._old.__contains__, keys):
            self._young[key] = self._old.pop(key)

    def _drop(self, worker: _Worker, keys: int | tuple[int, ...]) -> None:
        for key in keys if isinstance(keys, tuple) else (keys,):
            if _without(self._young, key, worker.bit) or _without(self._old, key, worker.bit):
                self._entries -= 1
            else:
                worker.given_up -= 1

    def _evict(self) -> None:
        """Give up what was not used for longest, later blocks of a chain before earlier ones."""
        while self._entries > self._max_entries:
            if not self._old:
                self._old, self._young = self._young, {}
            _, holders = self._old.popitem()
            self._entries -= holders.bit_count()
            for slot in _slots(holders):
                worker = self._workers[self._names[slot]]
                worker.given_up += 1
                if worker.given_up > len(worker.keys) // 2 + 64:
                    self._sweep(worker)

    def _sweep(self, worker: _Worker) -> None:
        """Forget the engine hashes of blocks that were given up."""
        bit, young, old = worker.bit, self._young, self._old
        worker.keys = {
            name: keys
            for name, keys in worker.keys.items()
            if any((young.get(k) or old.get(k, 0)) & bit for k in (keys if isinstance(keys, tuple) else (keys,)))
        }
        worker.copies = {name: copies for name, copies in worker.copies.items() if name in worker.keys}
        worker.given_up = 0

    def _turn_predictions(self, now: float) -> None:
        age_s = now - self._turned_at
        if age_s < self._life_s and len(self._predicted) <= self._max_entries // 4:
            return
        self._predicted_before = self._predicted if age_s < 2 * self._life_s else {}
        self._predicted = {}
        self._turned_at = now


def _slots(holders: int) -> Iterator[int]:
    while holders:
        slot = holders.bit_length() - 1
        yield slot
        holders ^= 1 << slot


def _join(blocks: dict[int, int], keys: Sequence[int], bit: int) -> int:
    """Add a holder to each of `keys`; neighbours share one set object. Returns to how many it was new."""
    before, after, new = 0, bit, 0
    for key in keys:
        holders = blocks.get(key, 0)
        if holders & bit:
            continue
        if holders != before:
            before, after = holders, holders | bit
        blocks[key] = after
        new += 1
    return new


def _without(blocks: dict[int, int], key: int, bit: int) -> bool:
    """Take a holder from a block, and the block out when it was the last; whether it was one."""
    holders = blocks.get(key, 0)
    if not holders & bit:
        return False
    if holders == bit:
        del blocks[key]
    else:
        blocks[key] = holders ^ bit
    return True
