"""Real vLLM engines on CPU: a second decode worker comes under load and leaves after it, and no stream notices.

`make test-elastic-engine`: three engines share the machine, and one takes a minute or more to start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.chaos.streams import certain, stream
from tests.conftest import ROOT, Server, baton_serve, wait_for
from tests.pools import Pools

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]

PLACES = 4
"""Streams in a step of an engine: so few that a few clients need a second one, however fast the machine is."""

CLIENTS, TOKENS = 2 * PLACES - 2, 64
GROWS_WITHIN_S, SHRINKS_WITHIN_S = 1200.0, 600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's settings with room for a second decode worker; no process may be left after it."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "deploy/config/demo.yaml").read_text())
    settings["engine_args"] |= {"kv_cache_memory_bytes": 2**29}
    settings["decode"]["engine_args"] |= {"max_num_seqs": PLACES}
    settings["scaling"] = {"decode": {"min": 1, "max": 2}, "shrink_after_s": 20, "borrow_s": 2}
    settings["routing"] = {"preset": "always-disaggregated"}
    settings["objectives"] = {"ttft_s": 30, "itl_s": 1}  # as slow as three engines on a few cores may be
    path: Path = tmp_path_factory.mktemp("engines") / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    with baton_serve(path, timeout_s=1200) as server:
        yield server


class Load:
    """Clients that ask one after the other until they are told to stop.

    Args:
        expected: what they ask, and what they have to get.
    """

    def __init__(self, server: Server, expected: dict[str, str]) -> None:
        self.done = 0
        self._server = server
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS)
        asked = islice(cycle(expected.items()), CLIENTS)
        self._clients = [self._threads.submit(self._ask, prompt, text) for prompt, text in asked]

    def _ask(self, prompt: str, text: str) -> None:
        with httpx.Client(base_url=self._server.url, timeout=600) as client:
            while not self._stop.is_set():
                assert stream(client, prompt, TOKENS) == text
                self.done += 1

    def stop(self) -> None:
        """End, and raise what any client met."""
        self._stop.set()
        for client in self._clients:
            client.result(600)
        self._threads.shutdown()


def decode(server: Server) -> dict[str, int]:
    """How many decode workers there are, by their state, and should be; nothing before anybody has decided."""
    pool = server.client.get("/baton/fleet").json()["pools"].get("decode")
    if pool is None:
        return {}
    load = {name: int(pool["load"][name]) for name in ("ready", "starting", "draining")}
    return {**load, "desired": int(pool["answer"]["workers"])}


def streams(server: Server, engine_id: str) -> int:
    """Streams of one worker."""
    workers = server.client.get("/baton/fleet").json()["workers"]
    return sum(worker["streams"] for worker in workers if worker["engine_id"] == engine_id)


def test_from_one_decode_worker_to_two_and_back(server: Server) -> None:
    """It grows for more streams than one engine has places for, serves with both, and shrinks when they are gone."""
    pools, expected = Pools(server), certain(server, TOKENS)
    one = {"ready": 1, "starting": 0, "draining": 0, "desired": 1}
    assert wait_for(lambda: decode(server) == one, 60), decode(server)
    (first,) = pools.engines("decode")
    began, load = time.monotonic(), Load(server, expected)
    try:
        assert wait_for(lambda: decode(server)["ready"] == 2, GROWS_WITHIN_S), decode(server)
        grown_s = time.monotonic() - began
        (second,) = set(pools.engines("decode")) - {first}
        assert wait_for(lambda: streams(server, second) >= 2, 120), "the second worker has nothing to do"
        done = load.done
        assert wait_for(lambda: load.done >= done + 2 * CLIENTS, 600)
    finally:
        load.stop()
    ended = time.monotonic()
    assert wait_for(lambda: decode(server) == one, SHRINKS_WITHIN_S), decode(server)
    assert wait_for(lambda: len(server.engine_cores("decode")) == 1, 60)
    shrunk_s = time.monotonic() - ended
    assert not pools.wait_until_free(30)
    assert not pools.leases_expired()
    recent = server.client.get("/baton/fleet").json()["recent"]
    assert not [event for event in recent if event["what"].startswith("lost")]
    print(f"two workers after {grown_s:.0f} s, one {shrunk_s:.0f} s after the load; {load.done} streams, none lost")
    pools.close()
