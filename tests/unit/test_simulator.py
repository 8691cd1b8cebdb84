"""The simulated engine: text, roles, handoffs, cache and faults, as a front end sees them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from decode.request import decode_leg
from kv_transfer.engine import EngineDied
from kv_transfer.handoff import Handoff, release_leg
from kv_transfer.settings import EngineSettings, SimulatorSettings, TransportSettings
from kv_transfer.sim_cache import BlockCache
from kv_transfer.simulator import SimulatedEngine
from prefill.request import prefill_leg

BLOCK, WINDOW, VOCABULARY = 4, 256, 1200
PROMPT = list(range(100, 150))
PATIENCE_S = 10.0

Start = Callable[..., Awaitable[SimulatedEngine]]
Outputs = list[EngineCoreOutput]


def new_request(
    request_id: str, prompt: Sequence[int] = PROMPT, salt: str | None = None, **sampling: Any
) -> EngineCoreRequest:
    """A request as a front end makes it: 8 tokens unless told otherwise."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 8, **sampling}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
    )


async def new_engine(folder: Path, role: str = "decode", lease_s: float = 60, **simulator: Any) -> SimulatedEngine:
    """An engine with a tiny model; it takes no time unless told otherwise."""
    (folder / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}, "max_position_embeddings": {WINDOW}}}')
    engine_settings = EngineSettings(
        role=role,  # type: ignore[arg-type]
        model=str(folder),
        transport=TransportSettings().model_copy(update={"lease_s": lease_s}),  # type: ignore[call-arg]
        simulator=SimulatorSettings(**{"zero_time": True, "block_tokens": BLOCK, **simulator}),
    )
    return await SimulatedEngine.start(engine_settings)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts engines that stop with the test."""
    engines: list[SimulatedEngine] = []

    async def start_one(role: str = "decode", **simulator: Any) -> SimulatedEngine:
        engines.append(await new_engine(tmp_path, role, **simulator))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.shutdown()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens without an output."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


async def run(engine: SimulatedEngine, *requests: EngineCoreRequest) -> dict[str, Outputs]:
    """Run requests together; all outputs until each has ended."""
    seen: dict[str, Outputs] = {request.request_id: [] for request in requests}
    for request in requests:
        await engine.add(request)
    async with asyncio.timeout(PATIENCE_S):
        while not all(outputs and outputs[-1].finished for outputs in seen.values()):
            for output in (await engine.outputs()).outputs:
                seen[output.request_id].append(output)  # a KeyError: an output that nobody asked for
    return seen


async def alone(engine: SimulatedEngine, request: EngineCoreRequest) -> Outputs:
    """Run one request to its end."""
    return (await run(engine, request))[request.request_id]


async def prefilled(engine: SimulatedEngine, request: EngineCoreRequest) -> Handoff:
    """Run the prefill leg of `request`."""
    outputs = await alone(engine, prefill_leg(request, f"{request.request_id}-p"))
    return Handoff.from_params(outputs[-1].kv_transfer_params)


def text(outputs: Outputs) -> list[int]:
    """The tokens of an answer."""
    return [token for output in outputs for token in output.new_token_ids]


def stats(outputs: Outputs) -> tuple[int, int, int]:
    """Prompt tokens that were computed, found in the engine's own cache, and pulled."""
    found = outputs[0].prefill_stats
    assert found is not None and all(output.prefill_stats is None for output in outputs[1:])
    return found.num_computed_tokens, found.num_local_cached_tokens, found.num_external_cached_tokens


def in_use(*engines: SimulatedEngine) -> int:
    """Everything that engines hold: requests, blocks, handoffs."""
    names = ("waiting", "running", "fetching", "blocks_held", "handoffs")
    return sum(engine.state()[name] for engine in engines for name in names)


@pytest.mark.parametrize("made", [0, 1, 5, 7])
async def test_text_goes_on_from_any_point(start: Start, made: int) -> None:
    """Another engine goes on from prompt and answer as the first one would have."""
    whole = text(await alone(await start(), new_request("r")))
    assert len(whole) == 8
    rest = await alone(await start(), new_request("r", [*PROMPT, *whole[:made]], max_tokens=8 - made))
    assert text(rest) == whole[made:]
    assert text(await alone(await start(), new_request("r", PROMPT[1:]))) != whole


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 50])
async def test_disaggregated_text(start: Start, length: int) -> None:
    """Prefill and decode give one engine's text; decode pulls all but the last prompt token, which it computes."""
    prefill, decode, request = await start("prefill"), await start(), new_request("r", PROMPT[:length])
    expected = text(await alone(await start(), request))
    outputs = await alone(decode, decode_leg(request, "d", await prefilled(prefill, request)))
    assert text(outputs) == expected
    assert stats(outputs) == (1, 0, length - 1)
    assert decode.state()["pulls"] == 1
    assert decode.state()["pulled_bytes"] == (length - 1) * SimulatorSettings().kv_bytes_per_token  # type: ignore[call-arg]
    assert in_use(prefill, decode) == 0


async def test_decode_pulls_only_what_it_lacks(start: Start) -> None:
    """Blocks in the decode engine's own cache are not pulled again."""
    prefill, decode = await start("prefill"), await start()
    await alone(decode, new_request("before", PROMPT[:20]))
    outputs = await alone(decode, decode_leg(new_request("r"), "d", await prefilled(prefill, new_request("r"))))
    assert stats(outputs) == (1, 20, 29)


@pytest.mark.parametrize("pull", [True, False])
async def test_a_handoff_pins_its_blocks_until_it_is_settled(start: Start, pull: bool) -> None:
    """Blocks of a finished prefill stay until they are pulled or released, and no longer."""
    prefill, decode = await start("prefill"), await start()
    handoff = await prefilled(prefill, new_request("r"))
    assert prefill.state()["handoffs"] == 1
    assert prefill.state()["blocks_held"] >= math.ceil(len(PROMPT) / BLOCK)
    assert not await prefill.call("reset_prefix_cache")
    if pull:
        await decode.add(decode_leg(new_request("r"), "d", handoff))
    else:
        await prefill.add(release_leg(handoff))
    await until(lambda: in_use(prefill) == 0 and decode.state()["pulls"] == pull)
    assert prefill.state()["leases_expired"] == 0
    assert await prefill.call("reset_prefix_cache")


async def test_a_lease_is_the_last_resort(start: Start) -> None:
    """A handoff that nobody settles frees its blocks when its lease ends, which is counted; then it can't be pulled."""
    prefill, decode = await start("prefill", lease_s=0.01), await start()
    handoff = await prefilled(prefill, new_request("r"))
    await until(lambda: prefill.state()["leases_expired"] == 1)
    assert in_use(prefill) == 0
    assert (await alone(decode, decode_leg(new_request("r"), "d", handoff)))[-1].finish_reason is FinishReason.ERROR
    assert in_use(decode) == 0


@pytest.mark.parametrize(
    ("key", "value"), [("remote_engine_id", "x"), ("remote_request_id", "x"), ("remote_host", None)]
)
async def test_a_handoff_that_leads_nowhere(start: Start, key: str, value: str | None) -> None:
    """Who names another engine or request, or no address, gets nothing and frees nothing, and is told so."""
    prefill, decode = await start("prefill"), await start()
    params = {**(await prefilled(prefill, new_request("r"))).params, key: value}
    wrong = Handoff({name: value for name, value in params.items() if value is not None})
    assert (await alone(decode, decode_leg(new_request("r"), "d", wrong)))[-1].finish_reason is FinishReason.ERROR
    assert (in_use(decode), prefill.state()["handoffs"]) == (0, 1)


NEVER_THERE = {"zero_time": False, "transfer_bytes_per_s": 1.0}
ABORTS: list[tuple[str, dict[str, Any], bool]] = [
    ("waiting", {"max_batch_requests": 1}, False),
    ("running", {}, False),
    ("fetching", NEVER_THERE, False),
    ("fetching", NEVER_THERE, True),
]


@pytest.mark.parametrize(("where", "simulator", "cached"), ABORTS)
async def test_abort(start: Start, where: str, simulator: dict[str, Any], cached: bool) -> None:
    """An abort frees all blocks here and at the prefill engine, wherever the request is; no output follows."""
    prefill, decode = await start("prefill"), await start(**simulator)
    if cached:
        await alone(decode, new_request("before", PROMPT[:20]))
    await decode.call("inject_fault", "hang", True)
    if where == "waiting":
        await decode.add(new_request("first"))
    await decode.add(decode_leg(new_request("r"), "d", await prefilled(prefill, new_request("r"))))
    await until(lambda: decode.state()[where] == 1 and decode.state()["running"] + decode.state()["fetching"] > 0)
    assert prefill.state()["handoffs"] == (where != "running")
    await decode.abort(["d", "first", "unknown"])
    assert in_use(decode) == 0
    await until(lambda: in_use(prefill) == 0)
    assert prefill.state()["leases_expired"] == 0
    await decode.call("inject_fault", "hang", False)
    assert len(text(await alone(decode, new_request("after")))) == 8


@pytest.mark.parametrize(("length", "hit"), [(BLOCK - 1, 0), (BLOCK + 1, BLOCK), (3 * BLOCK, 3 * BLOCK - 1)])
async def test_a_repeated_prompt_hits_the_cache(start: Start, length: int, hit: int) -> None:
    """Full blocks of an earlier prompt are not read again, but for the last token; another salt shares nothing."""
    engine = await start()
    runs = [await alone(engine, new_request(str(i), PROMPT[:length], salt)) for i, salt in enumerate((None, None, "s"))]
    assert [stats(outputs) for outputs in runs] == [(length, 0, 0), (length - hit, hit, 0), (length, 0, 0)]
    assert len({tuple(text(outputs)) for outputs in runs}) == 1


def test_eviction_takes_the_least_recently_used_and_never_what_is_held() -> None:
    """Ends of old chains go first; held blocks stay; what has no room is refused whole."""
    cache = BlockCache(4)
    for chain in ("ab", "c", "d"):
        assert cache.hold(chain)
        cache.fill(chain)
        cache.release(chain)
    assert cache.hold("a") and cache.hold("x")  # takes b, the end of the oldest chain
    assert [cache.hits(key) for key in "abcd"] == [1, 0, 1, 1]
    assert not cache.hold("wyz") and cache.held == 2
    assert cache.hold("y") and cache.hold("z")
    assert [cache.hits(key) for key in "acd"] == [1, 0, 0]
    assert not cache.hold("c")


@given(st.lists(st.tuples(st.sampled_from(["hold", "fill", "release"]), st.text("abcdef", min_size=1, max_size=4))))
def test_the_cache_tells_what_can_be_hit(operations: list[tuple[str, str]]) -> None:
    """Whoever follows what is filled and removed knows exactly the blocks that can be hit."""
    known: set[Any] = set()

    def removed(keys: Sequence[Any]) -> None:
        assert keys and known.issuperset(keys)
        known.difference_update(keys)

    cache, holding = BlockCache(4, removed), list[str]()
    for operation, text_ in operations:
        chain = "".join(dict.fromkeys(text_))
        if operation == "hold" and cache.hold(chain):
            holding.append(chain)
        elif operation == "fill" and chain in holding:
            stored = cache.fill(chain)
            assert known.isdisjoint(stored)
            known.update(stored)
        elif operation == "release" and holding:
            cache.release(holding.pop())
        assert known == {key for key in "abcdef" if cache.hits(key)}


async def test_what_can_never_fit_ends_at_once(start: Start) -> None:
    """A request larger than the cache ends with an error, even while a handoff is pinned; others only wait."""
    engine = await start("prefill", num_blocks=16)
    handoff = await prefilled(engine, new_request("r", PROMPT[:8]))
    others = [new_request(str(i), [i] * 30, max_tokens=2) for i in range(3)]
    outputs = await run(engine, new_request("huge", range(100)), *others)
    assert outputs.pop("huge")[-1].finish_reason is FinishReason.ERROR
    assert [len(text(o)) for o in outputs.values()] == [2, 2, 2]
    await engine.add(release_leg(handoff))
    await until(lambda: in_use(engine) == 0)


ENDINGS: list[tuple[str, int, dict[str, Any], int, FinishReason]] = [
    ("max_tokens", 50, {"max_tokens": 5}, 5, FinishReason.LENGTH),
    ("a stop token", 50, {"stop": 2}, 3, FinishReason.STOP),
    ("a stop token after min_tokens", 50, {"stop": 2, "min_tokens": 2}, 3, FinishReason.STOP),
    ("a stop token before min_tokens", 50, {"stop": 2, "min_tokens": 3}, 8, FinishReason.LENGTH),
    ("the window", WINDOW - 6, {"max_tokens": 20}, 6, FinishReason.LENGTH),
]


@pytest.mark.parametrize(
    ("length", "sampling", "tokens", "reason"), [e[1:] for e in ENDINGS], ids=[e[0] for e in ENDINGS]
)
async def test_endings(start: Start, length: int, sampling: dict[str, Any], tokens: int, reason: FinishReason) -> None:
    """What ends an answer, and what it says then; `stop` is the index of the token to stop at."""
    engine, prompt = await start(), list(range(length))
    undisturbed = text(await alone(engine, new_request("r", prompt)))
    stop = [undisturbed[index] for index in [sampling.pop("stop")]] if "stop" in sampling else []
    outputs = await alone(engine, new_request("r", prompt, stop_token_ids=stop, **sampling))
    assert (len(text(outputs)), outputs[-1].finish_reason) == (tokens, reason)
    assert outputs[-1].stop_reason == (stop[0] if reason is FinishReason.STOP else None)


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_logprobs(start: Start, count: int) -> None:
    """As vLLM's: the sampled token with its rank from 1, then the likeliest, all of the vocabulary."""
    for output in await alone(await start(), new_request("r", max_tokens=50, logprobs=count)):
        logprobs = output.new_logprobs
        assert logprobs is not None
        assert logprobs.logprob_token_ids.shape == logprobs.logprobs.shape == (1, count + 1)
        assert logprobs.logprob_token_ids[0, 0] == output.new_token_ids[0]
        assert logprobs.logprob_token_ids.max() < VOCABULARY
        assert (logprobs.logprobs < 0).all() and list(logprobs.sampled_token_ranks) == [1]


async def test_a_long_prompt_does_not_stop_a_stream(start: Start) -> None:
    """Prompts are read in chunks beside the others' tokens."""
    engine = await start(max_step_tokens=8)
    await engine.add(new_request("stream", [1], max_tokens=50))
    await engine.add(new_request("long", range(80), max_tokens=1))
    order: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while "long" not in order:
            order += [output.request_id for output in (await engine.outputs()).outputs]
    assert order.count("stream") >= 10


@pytest.mark.parametrize(
    ("simulator", "slow", "least_s"), [({"step_base_s": 0.005}, 4.0, 0.06), ({"prefill_tokens_per_s": 500}, 1.0, 0.1)]
)
async def test_time_passes_as_set(start: Start, simulator: dict[str, float], slow: float, least_s: float) -> None:
    """Steps and prompts take the time that the settings say, and more on a slow engine."""
    engine = await start(zero_time=False, **simulator)
    await engine.call("inject_fault", "slow", slow)
    started = time.monotonic()
    await alone(engine, new_request("r", max_tokens=3))
    assert time.monotonic() - started > 0.95 * least_s


async def test_a_failed_pull(start: Start) -> None:
    """It ends with an error and leaves nothing here, not even in the cache; the handoff can be pulled again."""
    prefill, decode, request = await start("prefill"), await start(), new_request("r")
    handoff = await prefilled(prefill, request)
    await decode.call("inject_fault", "fail_pulls", 1)
    failed = await alone(decode, decode_leg(request, "d1", handoff))
    assert (text(failed), failed[-1].finish_reason) == ([], FinishReason.ERROR)
    assert (in_use(decode), prefill.state()["handoffs"]) == (0, 1)
    assert stats(await alone(decode, decode_leg(request, "d2", handoff))) == (1, 0, len(PROMPT) - 1)
    assert in_use(prefill, decode) == 0


async def test_prompt_logprobs_name_every_prompt_token(start: Start) -> None:
    """All but the first prompt token have theirs, with the first output: `echo` with logprobs needs them."""
    engine = await start()
    outputs = await alone(engine, new_request("r", PROMPT, prompt_logprobs=2))
    told = outputs[0].new_prompt_logprobs_tensors
    assert told.logprob_token_ids[:, 0].tolist() == PROMPT[1:]
    assert told.logprobs.shape == (len(PROMPT) - 1, 3)
    assert all(output.new_prompt_logprobs_tensors is None for output in outputs[1:])


async def test_a_hanging_engine(start: Start) -> None:
    """It takes requests and gives nothing until the fault is over."""
    engine = await start()
    await engine.call("inject_fault", "hang", True)
    answer = asyncio.ensure_future(alone(engine, new_request("r")))
    await until(lambda: engine.state()["running"] == 1)
    assert not (await asyncio.wait([answer], timeout=0.02))[0]
    await engine.call("inject_fault", "hang", False)
    assert len(text(await answer)) == 8


async def test_a_dead_engine(start: Start) -> None:
    """Whoever waits is told, and whoever comes later; nobody can pull from it, and it settles nothing any more."""
    prefill, decode, other = await start("prefill"), await start(), await start()
    first = await prefilled(prefill, new_request("1"))
    await decode.add(decode_leg(new_request("1"), "d", first))
    await until(lambda: decode.state()["fetching"] == 1)
    waiting = asyncio.ensure_future(decode.outputs())
    await asyncio.sleep(0)
    await decode.call("inject_fault", "dead", True)
    for outputs in (waiting, decode.outputs()):
        with pytest.raises(EngineDied):
            await outputs
    second = await prefilled(prefill, new_request("2"))
    assert stats(await alone(other, decode_leg(new_request("2"), "d", second))) == (1, 0, len(PROMPT) - 1)
    assert prefill.state()["handoffs"] == 1
    await prefill.call("inject_fault", "dead", True)
    assert (await alone(other, decode_leg(new_request("1"), "d", first)))[-1].finish_reason is FinishReason.ERROR


OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["whole", "handed over"]), st.integers(1, 40)),
    st.tuples(st.just("abort"), st.integers(1, 4)),
    st.tuples(st.just("handed over, and left"), st.integers(0, 40)),
    st.tuples(st.just("fail a pull"), st.none()),
    st.tuples(st.just("turns"), st.integers(1, 20)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=20))
def test_nothing_is_held_once_all_has_ended(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, Any]]
) -> None:
    """Whatever comes, ends, fails and is aborted in whatever order: no request, block or handoff stays."""
    held, leases_expired = asyncio.run(play(tmp_path_factory.getbasetemp(), operations))
    assert held == 0
    assert leases_expired == 0


async def play(folder: Path, operations: list[tuple[str, Any]]) -> tuple[int, int]:
    """Do `operations` on a pair of small engines, whose legs are passed on as a front end does.

    Returns:
        what they hold once nothing more happens, and how many leases ran out.
    """
    prefill, decode = [await new_engine(folder, role, num_blocks=24) for role in ("prefill", "decode")]
    requests, handoffs, gone = dict[str, EngineCoreRequest](), dict[str, Handoff](), set[str]()

    async def hand_over() -> None:
        while True:
            for output in (await prefill.outputs()).outputs:
                leg_id = output.request_id
                handoff = handoffs[leg_id] = Handoff.from_params(output.kv_transfer_params)
                if leg_id in gone:
                    await prefill.add(release_leg(handoff))
                else:
                    await decode.add(decode_leg(requests[leg_id], leg_id, handoff))

    async def release_failed() -> None:
        while True:
            for output in (await decode.outputs()).outputs:
                if output.finish_reason is FinishReason.ERROR:
                    await prefill.add(release_leg(handoffs[output.request_id]))

    async def turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def abort(request_id: str) -> None:
        gone.add(request_id)
        for engine in (prefill, decode):
            await engine.abort([request_id])

    readers = [asyncio.ensure_future(hand_over()), asyncio.ensure_future(release_failed())]
    for number, (operation, value) in enumerate(operations):
        if operation == "whole":
            await decode.add(new_request(str(number), [value % 3] * value))
        elif operation == "handed over":
            requests[str(number)] = new_request(str(number), [value % 3] * value)
            await prefill.add(prefill_leg(requests[str(number)], str(number)))
        elif operation == "handed over, and left":
            requests[str(number)] = new_request(str(number))
            await prefill.add(prefill_leg(requests[str(number)], str(number)))
            await turns(value)
            await abort(str(number))
        elif operation == "abort":
            await abort(str(number - value))
        elif operation == "fail a pull":
            decode.faults.fail_pulls += 1
        else:
            await turns(value)
    with suppress(TimeoutError):  # what is held then is told
        await until(lambda: in_use(prefill, decode) == 0 or any(reader.done() for reader in readers))
    assert not any(reader.done() for reader in readers)
    left = in_use(prefill, decode), prefill.state()["leases_expired"]
    for engine, reader in zip((prefill, decode), readers, strict=True):
        engine.shutdown()
        reader.cancel()
    return left
