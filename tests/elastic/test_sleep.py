"""Pools that sleep, on real Ray: no worker is left when there is nothing to do, and the first request wakes them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import ROOT, Server, baton_serve, wait_for

SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "scaling": {"prefill": {"min": 0}, "decode": {"min": 0}, "idle_s": 5},
    "limits": {"wait_for_worker_s": 600},
}

ASLEEP_S, AWAKE_S = 120.0, 600.0


def workers(server: Server) -> dict[str, tuple[int, int]]:
    """For each pool how many workers are linked, and how many there should be."""
    fleet = server.client.get("/baton/fleet").json()
    linked = {pool: sum(worker["role"] == pool for worker in fleet["workers"]) for pool in ("prefill", "decode")}
    return {pool: (linked[pool], state["answer"]["workers"]) for pool, state in fleet["pools"].items()}


def waiting(server: Server) -> int:
    """Requests in the waiting room."""
    return int(server.client.get("/baton/fleet").json()["waiting"]["requests"])


@pytest.mark.timeout(1500)
def test_to_zero_and_back(tmp_path: Path) -> None:
    """Requests that find everybody asleep wait, wake both pools, and are all answered; then the pools sleep again."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    asleep = {"prefill": (0, 0), "decode": (0, 0)}
    with baton_serve(path) as server, ThreadPoolExecutor(8) as threads:
        server.client.timeout = httpx.Timeout(AWAKE_S)
        assert server.complete("Once", max_tokens=4)["choices"][0]["finish_reason"] == "length"
        assert wait_for(lambda: workers(server) == asleep, ASLEEP_S), workers(server)
        time.sleep(2.0)  # and they stay so: nobody asks
        assert workers(server) == asleep
        answers = [threads.submit(server.complete, f"Once {number}", max_tokens=4) for number in range(8)]
        assert wait_for(lambda: waiting(server) == 8, 30)
        assert {answer.result(AWAKE_S)["choices"][0]["finish_reason"] for answer in answers} == {"length"}
        assert waiting(server) == 0
        assert wait_for(lambda: workers(server) == asleep, ASLEEP_S), workers(server)
