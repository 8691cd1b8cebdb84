"""Kills of real vLLM engines in the middle of streams: `make chaos-engine`. Each replacement takes a minute or two.

`BATON_CHAOS_SEED`, `BATON_CHAOS_KILLS` (of each kind) and `BATON_FUZZ_BODIES` choose the run; `-k` chooses kinds.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.chaos.streams import body, certain, leave, stream
from tests.conftest import ROOT, Server, baton_serve, wait_for
from tests.fuzz.bodies import VALID, mutated
from tests.pools import ROLES, Pools

SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))
KILLS = int(os.environ.get("BATON_CHAOS_KILLS", "10"))
BODIES = int(os.environ.get("BATON_FUZZ_BODIES", "1000"))
TOKENS = 64
REPLACED_S = 400.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """`make serve` as a user runs it: one prefill and one decode worker; no process may be left after it."""
    with baton_serve(ROOT / "deploy/config/demo.yaml", timeout_s=1200) as server:
        yield server


@pytest.fixture(scope="module")
def pools(server: Server) -> Iterator[Pools]:
    """The workers behind the server."""
    pools = Pools(server)
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, str]:
    """Prompts whose greedy continuation is beyond doubt, and that continuation."""
    return certain(server, TOKENS)


def live_streams(server: Server, expected: dict[str, str], chance: random.Random, at: int) -> tuple[Any, ...]:
    """Four streams at work; the first has had `at` events when this returns, the others are wherever they are."""
    client = httpx.Client(base_url=server.url, timeout=REPLACED_S)
    threads, reached = ThreadPoolExecutor(4), threading.Event()
    prompts = chance.sample(sorted(expected), 3)
    prompts.append(chance.choice(prompts))

    def first(count: int) -> None:
        if count >= at:
            reached.set()

    work: list[Future[str]] = []
    for number, prompt in enumerate(prompts):
        work.append(threads.submit(stream, client, prompt, TOKENS, *([first] if number == 0 else [])))
    if at:
        assert reached.wait(60)
    return client, threads, list(zip(prompts, work, strict=True))


def finish(live: tuple[Any, ...], expected: dict[str, str]) -> None:
    """Every stream has ended once, with the undisturbed text."""
    client, threads, work = live
    got = [(prompt, future.result(REPLACED_S)) for prompt, future in work]
    threads.shutdown()
    client.close()
    assert got == [(prompt, expected[prompt]) for prompt, _ in got]


def whole(server: Server, pools: Pools, died: str) -> bool:
    """Both pools have a worker again, and none is `died`."""
    engines = [pools.engines(role) for role in ROLES]
    if [len(pool) for pool in engines] != [1, 1] or died in (engines[0] + engines[1]):
        return False
    return server.client.get("/health").status_code == 200


VICTIMS: dict[str, Callable[[Server, int], tuple[str, int]]] = {
    "prefill_core": lambda server, turn: ("prefill", server.engine_cores("prefill")[0]),
    "decode_core": lambda server, turn: ("decode", server.engine_cores("decode")[0]),
    "replica": lambda server, turn: (ROLES[turn % 2], server.pids(ROLES[turn % 2])[0]),
}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", list(VICTIMS))
def test_kills(server: Server, pools: Pools, expected: dict[str, str], kind: str) -> None:
    """Each kill costs no stream anything but time; survivors hold nothing after it; the killed one is replaced."""
    chance, expired = random.Random(f"{kind} {SEED}"), pools.leases_expired()
    for turn in range(KILLS):
        # A prefill worker is at work before the first token of some stream, a decode worker between tokens.
        at = chance.choice((0, 0, 1)) if kind == "prefill_core" else chance.randint(1, TOKENS - 20)
        live = live_streams(server, expected, chance, at)
        time.sleep(chance.uniform(0, 0.6))
        role, pid = VICTIMS[kind](server, turn)
        died, killed = pools.engines(role)[0], time.monotonic()
        os.kill(pid, signal.SIGKILL)
        finish(live, expected)
        ended = time.monotonic() - killed
        assert wait_for(lambda died=died: whole(server, pools, died), REPLACED_S)  # type: ignore[misc]
        # Only now: the survivor has been warming the new worker, with blocks of its own.
        assert not pools.wait_until_free(5)
        assert pools.leases_expired() <= expired
        expired = pools.leases_expired()
        print(
            f"seed {SEED} {kind} {turn + 1}: {role} at event {at}, streams over after {ended:.1f} s, "
            f"replaced after {time.monotonic() - killed:.1f} s"
        )
    assert not pools.wait_until_free(5)


@pytest.mark.timeout(1800)
def test_disconnects(server: Server, pools: Pools, expected: dict[str, str]) -> None:
    """Clients leave before, during and after each half, beside streams that stay: those are whole, nothing is held."""
    chance = random.Random(f"disconnects {SEED}")
    long_prompt = [2000 + i % 500 for i in range(1500)]
    for turn in range(KILLS):
        live = live_streams(server, expected, chance, chance.randint(0, 5))
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for prompt in (long_prompt[: chance.randint(1, 1500)], chance.choice(sorted(expected))):
                for wait_s in (0.0, chance.uniform(0, 0.1), chance.uniform(0.1, 1.0)):  # while queued, read, pulled
                    hang_up(server, prompt, wait_s)
                for events in (0, 1, chance.randint(2, 20)):  # at the first token, and while it writes
                    leave(client, prompt, TOKENS, events)
        finish(live, expected)
        assert not pools.wait_until_free(5), f"blocks are held after turn {turn}"
    print(f"seed {SEED}: {KILLS * 12} disconnects, {KILLS * 2} of each stage")


def hang_up(server: Server, prompt: Any, after_s: float) -> None:
    """Send a request and close the connection after a time, wherever the request is then."""
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(30, read=after_s or 0.001)) as client:
        try:
            client.post("/v1/completions", json=body(prompt, TOKENS, stream=False))
        except httpx.ReadTimeout:
            return


@pytest.mark.timeout(1800)
def test_bad_bodies(server: Server, pools: Pools, expected: dict[str, str]) -> None:
    """Mutated bodies reach real engines, samplers and grammars: no 5xx, and neither engine dies."""
    before, paths = [pools.engines(role) for role in ROLES], sorted(VALID)
    faults: list[str] = []

    def send(number: int) -> None:
        path = paths[number % len(paths)]
        sent = mutated(path, [], random.Random(f"{SEED} {number}"))
        with httpx.Client(base_url=server.url, timeout=10) as client:
            try:
                answer = client.post(path, content=sent, headers={"content-type": "application/json"})
            except httpx.ReadTimeout:
                return  # a long answer, which its client does not wait for
        if answer.status_code >= 500:
            faults.append(f"body {number} {path} {sent[:600]!r}: {answer.status_code} {answer.text[:300]}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, range(BODIES)))
    print(f"seed {SEED}: {BODIES} bodies")
    assert not faults, "\n".join(faults[:20])
    assert not pools.wait_until_free(5)
    assert [pools.engines(role) for role in ROLES] == before
    with httpx.Client(base_url=server.url, timeout=60) as client:
        prompt = min(expected)
        assert stream(client, prompt, TOKENS) == expected[prompt]
