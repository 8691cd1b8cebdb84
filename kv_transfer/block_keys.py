"""The names of KV blocks: what the prefix index calls a block, computed from a prompt or from an engine's news.

*Whose hashes.* vLLM names a block by a hash over tokens, parent and extra keys, but the function, its seed and the
block size are the engine's own (`prefix_caching_hash_algo`, `PYTHONHASHSEED`; xxhash has a fresh seed in every
process), and computing it costs a pickle and a SHA-256 for each block. So blocks have keys of our own. They are
computed from what the events carry in the clear, token ids and extra keys, and from a prompt by the same function; an
engine's hash is remembered only to find the block again when it is removed or is the parent of another. Engines of
different seeds, versions and kinds (the simulator too) so share one index, and a wrong match would cost time, never
correctness: engines compare their own hashes.

*Keys.* `key = hash(key of the parent, token ids, what is new in this block)`, 60 bits, good inside one process only.
The LoRA's name and the cache salt are folded into the root of the chain; a multimodal item is folded into the block in
which it starts. Both are so independent of the engine's block size: an engine whose blocks are k times as long as the
index's has k keys for each of its blocks. That adapters of one name are one adapter is assumed: events carry no path.

vLLM's side: `distributed/kv_events.py`, `v1/core/block_pool.py`, `v1/core/kv_cache_utils.py`, version 0.32.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EngineHash = bytes | int
"""A block's hash as an engine's events give it."""

_KEY_BITS = (1 << 60) - 1  # two digits of a Python int: 32 bytes


@dataclass(frozen=True)
class StoredBlocks:
    """Blocks that a worker has from now on: a run of full blocks of one chain, as vLLM's `BlockStored` tells it.

    Attributes:
        hashes: the engine's hash of each block.
        parent: the engine's hash of the block before the first; None at the start of a prompt.
        tokens: the token ids of all the blocks.
        block_tokens: the engine's block size.
        extra_keys: for each block what else its hash covers, untagged: the LoRA's name, pairs of a multimodal item's
            identifier and its offset in the block (below zero when it began before), the cache salt (first block
            only), digests of prompt embeddings as bytes.
    """

    hashes: Sequence[EngineHash]
    parent: EngineHash | None
    tokens: Sequence[int]
    block_tokens: int
    lora: str | None = None
    extra_keys: Sequence[Sequence[Any] | None] | None = None


def prompt_keys(
    tokens: Sequence[int],
    block_tokens: int,
    *,
    lora: str | None = None,
    salt: str | None = None,
    items: Sequence[tuple[str, int]] = (),
) -> list[int]:
    """The keys of the full blocks of a prompt, in order.

    Args:
        lora: name of the adapter.
        salt: the request's cache salt.
        items: identifier and offset in the prompt, in tokens, of each multimodal item.
    """
    starts: dict[int, list[Hashable]] = {}
    for name, offset in items:
        starts.setdefault(offset // block_tokens, []).append((name, offset % block_tokens))
    return _chain(_root(lora, salt), tokens, block_tokens, starts)


def stored_keys(stored: StoredBlocks, parent: int | None, block_tokens: int) -> list[int] | None:
    """The keys of blocks that an engine stored: `k` for each block that is `k` times as long as `block_tokens`.

    Args:
        parent: the key of the block before; None when they start a prompt.

    Returns:
        None when they can't be told: an odd block size, or tokens that don't cover the blocks (a sliding window).
    """
    if stored.block_tokens % block_tokens or len(stored.tokens) != len(stored.hashes) * stored.block_tokens:
        return None
    salt, extras = _read_extra_keys(stored, block_tokens)
    return _chain(_root(stored.lora, salt) if parent is None else parent, stored.tokens, block_tokens, extras)


def short(engine_hash: EngineHash) -> int:
    """An engine's hash in 60 bits."""
    return hash(engine_hash) & _KEY_BITS


def _root(lora: str | None, salt: str | None) -> int:
    return hash((lora, salt or None)) & _KEY_BITS


def _chain(
    parent: int, tokens: Sequence[int], block_tokens: int, extras: Mapping[int, Sequence[Hashable]]
) -> list[int]:
    """The keys of the blocks that follow `parent`; `extras` is what is new in a block, by its place."""
    keys: list[int] = []
    key = parent
    for block in zip(*[iter(tokens)] * block_tokens, strict=False):  # full blocks only
        key = hash((key, block)) & _KEY_BITS
        if extras and (extra := extras.get(len(keys))):
            key = hash((key, *extra)) & _KEY_BITS
        keys.append(key)
    return keys


def _read_extra_keys(stored: StoredBlocks, block_tokens: int) -> tuple[str | None, dict[int, list[Hashable]]]:
    """The cache salt, and what is new in each of the index's blocks, by its place in the run."""
    salt: str | None = None
    extras: dict[int, list[Hashable]] = {}
    for place, extra_keys in enumerate(stored.extra_keys or ()):
        start = place * stored.block_tokens
        names = [extra for extra in extra_keys or () if isinstance(extra, str)]
        if place == 0 and len(names) > (stored.lora is not None):
            salt = names[-1]
        for extra in extra_keys or ():
            if isinstance(extra, bytes):
                extras.setdefault(start // block_tokens, []).append(extra)
            elif not isinstance(extra, str) and extra[1] >= 0:  # an item that starts in this block
                block, offset = divmod(start + extra[1], block_tokens)
                extras.setdefault(block, []).append((extra[0], offset))
    return salt, extras
