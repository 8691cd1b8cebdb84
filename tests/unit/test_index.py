"""The prefix index: who holds which blocks of a prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.block_keys import StoredBlocks, prompt_keys
from kv_transfer.index import PrefixIndex

B = 4  # tokens in a block


def engine_hash(prefix: Sequence[int], seed: str = "") -> bytes:
    """A block's hash as an engine of some seed would give it."""
    return hashlib.sha256(f"{seed}{list(prefix)}".encode()).digest()


def stored(tokens: Sequence[int], start: int = 0, seed: str = "", block: int = B, **more: object) -> StoredBlocks:
    """The blocks of `tokens` from block `start` on."""
    ends = range((start + 1) * block, len(tokens) + 1, block)
    return StoredBlocks(
        hashes=[engine_hash(tokens[:end], seed) for end in ends],
        parent=engine_hash(tokens[: start * block], seed) if start else None,
        tokens=tokens[start * block : len(tokens) // block * block],
        block_tokens=block,
        **more,  # type: ignore[arg-type]
    )


def held(index: PrefixIndex, tokens: Sequence[int], now: float = 0.0) -> dict[str, int]:
    """Tokens that each worker holds of a prompt."""
    return dict(index.match(prompt_keys(tokens, index.block_tokens), now))


PROMPT = list(range(18))  # four full blocks


def test_match_counts_whole_blocks_from_the_start() -> None:
    """Each worker by the blocks that it has without a hole; most first."""
    index = PrefixIndex(B)
    index.add("a", stored(PROMPT[:8]))
    index.add("b", stored(PROMPT))
    index.add("c", stored([9, *PROMPT[1:]]))
    match = index.match(prompt_keys(PROMPT, B), 0.0)
    assert dict(match) == {"a": 8, "b": 16}
    assert list(match) == ["b", "a"]
    assert match.get("c", 0) == match.get("nobody", 0) == 0
    assert len(match) == 2
    with pytest.raises(KeyError):
        match["c"]


def test_engines_of_different_seeds_share_the_index() -> None:
    """Blocks are known by content, not by the engine's hash."""
    index = PrefixIndex(B)
    index.add("a", stored(PROMPT, seed="x"))
    index.add("b", stored(PROMPT, seed="y"))
    assert held(index, PROMPT) == {"a": 16, "b": 16}
    index.remove("b", [engine_hash(PROMPT[:16], "x")])
    assert held(index, PROMPT) == {"a": 16, "b": 16}, "that is another engine's name"
    index.remove("b", [engine_hash(PROMPT[:16], "y")])
    assert held(index, PROMPT) == {"a": 16, "b": 12}


def test_engine_blocks_longer_than_the_index() -> None:
    """An engine block counts as several blocks of the index, and goes as a whole."""
    index = PrefixIndex(B)
    index.add("a", stored(PROMPT, block=8))
    index.add("a", stored([*PROMPT[:16], *range(50, 58)], start=2, block=8))
    assert held(index, PROMPT) == {"a": 16}
    assert held(index, [*PROMPT[:16], *range(50, 58)]) == {"a": 24}
    index.remove("a", [engine_hash(PROMPT[:16])])
    assert held(index, PROMPT) == {"a": 8}


@pytest.mark.parametrize(
    "blocks",
    [
        stored(PROMPT, start=1),
        stored(PROMPT, block=3),
        StoredBlocks([b"1", b"2"], None, PROMPT[:4], B),
    ],
    ids=["unknown parent", "odd block size", "tokens that don't cover the blocks"],
)
def test_blocks_that_cannot_be_placed(blocks: StoredBlocks) -> None:
    """They are counted, and nothing is claimed of them."""
    index = PrefixIndex(B)
    index.add("a", blocks)
    assert (index.skipped, len(index), held(index, PROMPT)) == (len(blocks.hashes), 0, {})


def test_a_block_that_an_engine_has_twice() -> None:
    """Two requests that compute one prompt at a time leave two copies; the first eviction takes only one of them."""
    index = PrefixIndex(B)
    for _ in range(3):
        index.add("a", stored(PROMPT))
    for left in (16, 16, 0):
        index.remove("a", [engine_hash(PROMPT[:4])])
        assert held(index, PROMPT).get("a", 0) == left


WAYS = ({}, {"lora": "fr"}, {"salt": "s"}, {"lora": "s"}, {"lora": "fr", "salt": "s"}, {"items": [("cat", 5)]})


@pytest.mark.parametrize("block", [B, 2 * B])
@pytest.mark.parametrize(
    ("extra", "blocks"),
    [
        (WAYS[0], {}),
        (WAYS[1], {"lora": "fr", "extra_keys": [["fr"]] * 4}),
        (WAYS[2], {"extra_keys": [["s"], None, None, None]}),
        (WAYS[3], {"lora": "s", "extra_keys": [["s"]] * 4}),
        (WAYS[4], {"lora": "fr", "extra_keys": [["fr", "s"], ["fr"], ["fr"], ["fr"]]}),
        (WAYS[5], {"extra_keys": {4: [None, [["cat", 1]], [["cat", -3]], None], 8: [[["cat", 5]], [["cat", -3]]]}}),
    ],
    ids=lambda value: str(value),
)
def test_what_else_a_block_depends_on(extra: dict[str, object], blocks: dict[str, object], block: int) -> None:
    """LoRA, salt and multimodal items: a block is found by a prompt with the same ones, whatever the block size."""
    index = PrefixIndex(B)
    keys = blocks.get("extra_keys")
    if isinstance(keys, dict):
        blocks = {**blocks, "extra_keys": keys[block]}
    index.add("a", stored(PROMPT[:16], block=block, **blocks))
    for way in WAYS:
        found = index.match(prompt_keys(PROMPT, B, **way), 0.0).get("a", 0)  # type: ignore[arg-type]
        apart_from = 4 if not {"lora", "salt"} & {*way, *extra} else 0  # an item changes only what is after its start
        assert found == (16 if way == extra else apart_from)


def test_prompt_embeddings_are_not_tokens() -> None:
    """Blocks of embeddings don't match a prompt of the placeholder's token ids."""
    index = PrefixIndex(B)
    index.add("a", stored([0] * 8, extra_keys=[[b"digest"], [b"other"]]))
    assert held(index, [0] * 8) == {}


def test_predictions_live_shortly() -> None:
    """A block that is on its way counts, for one to two lives."""
    index = PrefixIndex(B, predicted_life_s=10.0)
    keys = prompt_keys(PROMPT, B)
    index.predict("a", keys, now=100.0)
    assert held(index, PROMPT, now=109.0) == {"a": 16}
    index.predict("b", keys[:1], now=111.0)
    assert held(index, PROMPT, now=119.0) == {"a": 16, "b": 4}
    assert held(index, PROMPT, now=122.0) == {"b": 4}
    assert held(index, PROMPT, now=150.0) == {}
    assert len(index) == 0


def test_news_outlive_predictions_and_clear_ends_both() -> None:
    """What was predicted and then stored stays; a reset of the worker's cache takes all."""
    index = PrefixIndex(B, predicted_life_s=10.0)
    index.predict("a", prompt_keys(PROMPT, B), now=0.0)
    index.add("a", stored(PROMPT[:8]))
    assert held(index, PROMPT, now=1.0) == {"a": 16}
    assert held(index, PROMPT, now=50.0) == {"a": 8}
    index.predict("a", prompt_keys(PROMPT, B), now=50.0)
    index.clear("a")
    assert held(index, PROMPT, now=51.0) == {}


def test_a_worker_that_follows_another_inherits_nothing() -> None:
    """A place in the sets of holders is free for the next worker only when it is clean."""
    index = PrefixIndex(B)
    index.add("a", stored(PROMPT))
    index.predict("a", prompt_keys(range(100, 108), B), now=0.0)
    index.forget("a")
    index.add("b", stored(PROMPT[:4]))
    assert held(index, PROMPT) == {"b": 4}
    assert held(index, range(100, 108)) == {}
    index.forget("nobody")
    assert len(index) == 1


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    """Beyond the bound goes what no request was routed to."""
    index = PrefixIndex(B, max_entries=100)
    used = list(range(1000, 1020))
    index.add("a", stored(used))
    for number in range(2000, 4000, 20):
        index.add("b", stored(range(number, number + 20)))
        index.predict("a", prompt_keys(used, B), now=float(number))
        assert len(index) <= 100
    assert held(index, used, now=1e6) == {"a": 20}
    worker = index._workers["b"]
    assert len(worker.keys) <= 2 * 100 + 128, "engine hashes of what was given up are swept"


PROMPTS = st.lists(st.integers(0, 1), min_size=B, max_size=5 * B).map(lambda bits: [b * 7 for b in bits])
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "remove", "clear", "forget"]),
        st.sampled_from(["a", "b", "c"]),
        PROMPTS,
        st.integers(0, 4),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.lists(PROMPTS, min_size=1, max_size=5))
def test_as_a_naive_model(operations: list[tuple[str, str, list[int], int]], prompts: list[list[int]]) -> None:
    """Whatever happens, a lookup equals a plain set of prefixes for each worker."""
    index = PrefixIndex(B)
    model: dict[str, Counter[tuple[int, ...]]] = {name: Counter() for name in "abc"}
    for operation, worker, tokens, start in operations:
        prefixes = model[worker]
        ends = range((start + 1) * B, len(tokens) + 1, B)
        if operation == "add" and ends:
            index.add(worker, stored(tokens, start, seed=worker))
            if not start or prefixes[tuple(tokens[: start * B])]:
                prefixes.update(tuple(tokens[:end]) for end in ends)
        elif operation == "remove":
            index.remove(worker, [engine_hash(tokens[:end], worker) for end in ends])
            prefixes.subtract(tuple(tokens[:end]) for end in ends if prefixes[tuple(tokens[:end])])
        elif operation in ("clear", "forget"):
            getattr(index, operation)(worker)
            prefixes.clear()
    for tokens in prompts:
        expected = {name: _leading(prefixes, tokens) for name, prefixes in model.items()}
        assert held(index, tokens) == {name: blocks * B for name, blocks in expected.items() if blocks}
    assert len(index) == sum(count > 0 for prefixes in model.values() for count in prefixes.values())


def _leading(prefixes: Counter[tuple[int, ...]], tokens: list[int]) -> int:
    blocks = 0
    while (end := (blocks + 1) * B) <= len(tokens) and prefixes[tuple(tokens[:end])]:
        blocks += 1
    return blocks


HELD = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 60))
"""So many blocks of one prompt on each worker."""


@settings(max_examples=300, deadline=None)
@given(HELD, HELD, st.integers(0, 60))
def test_holders_of_long_prompts(stored_blocks: dict[str, int], predicted: dict[str, int], blocks: int) -> None:
    """Not every block is looked at, and yet each worker has what it holds: in the engine, or by prediction."""
    tokens = list(range(60 * B))
    index = PrefixIndex(B)
    for worker, held_blocks in stored_blocks.items():
        index.add(worker, stored(tokens[: held_blocks * B]))
    for worker, held_blocks in predicted.items():
        index.predict(worker, prompt_keys(tokens[: held_blocks * B], B), now=0.0)
    expected = {}
    for worker in {*stored_blocks, *predicted}:
        most = min(blocks, max(stored_blocks.get(worker, 0), predicted.get(worker, 0)))
        if most:
            expected[worker] = most * B
    match = index.match(prompt_keys(tokens[: blocks * B], B), 0.0)
    assert dict(match) == expected
    assert list(match.values()) == sorted(expected.values(), reverse=True)


def test_few_blocks_of_a_long_prompt_are_looked_at() -> None:
    """A prompt of a thousand blocks costs a few tens of lookups."""
    tokens = list(range(1000 * B))
    index = PrefixIndex(B)
    index.add("a", stored(tokens[: 100 * B]))
    index.add("b", stored(tokens[: 700 * B]))

    class Counted(list[int]):
        looked_at = 0

        def __getitem__(self, place: Any) -> Any:
            self.looked_at += 1
            return super().__getitem__(place)

    keys = Counted(prompt_keys(tokens, B))
    assert dict(index.match(keys, 0.0)) == {"a": 100 * B, "b": 700 * B}
    assert keys.looked_at < 40


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 39))))
def test_holes_only_ever_add(holes: dict[str, set[int]]) -> None:
    """A worker with holes in its chain is never said to hold less than it does; a hole near the start always counts."""
    tokens = list(range(40 * B))
    index = PrefixIndex(B)
    index.add("whole", stored(tokens))
    for worker, places in holes.items():
        index.add(worker, stored(tokens))
        index.remove(worker, [engine_hash(tokens[: (place + 1) * B]) for place in places])
    found = held(index, tokens)
    assert found["whole"] == 40 * B
    for worker, places in holes.items():
        first, claimed = min(places, default=40), found.get(worker, 0) // B
        assert claimed == first if first < 8 else claimed >= first
        assert claimed not in range(1, 41) or claimed - 1 not in places


@settings(max_examples=100, deadline=None)
@given(OPERATIONS, st.integers(1, 8))
def test_bounded_index_claims_nothing_untrue(operations: list[tuple[str, str, list[int], int]], bound: int) -> None:
    """With eviction an index may know less than the workers hold, never more, and keeps its bound and its count."""
    index, unbounded = PrefixIndex(B, max_entries=bound), PrefixIndex(B)
    for operation, worker, tokens, start in operations:
        ends = range((start + 1) * B, len(tokens) + 1, B)
        for each in (index, unbounded):
            if operation == "add" and ends:
                each.add(worker, stored(tokens, start, seed=worker))
            elif operation == "remove":
                each.remove(worker, [engine_hash(tokens[:end], worker) for end in ends])
            elif operation in ("clear", "forget"):
                getattr(each, operation)(worker)
        known, true = held(index, tokens), held(unbounded, tokens)
        assert all(blocks <= true[name] for name, blocks in known.items())
        holders = [mask for blocks in (index._young, index._old) for mask in blocks.values()]
        assert len(index) == sum(mask.bit_count() for mask in holders) <= bound
