"""Deaths, hangs, stops and failing pulls on real Ray Serve with simulated engines, under load over HTTP.

`BATON_CHAOS_SEED` and `BATON_CHAOS_KILLS` choose the run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.load import Load
from tests.chaos.mischief import Mischief
from tests.conftest import ROOT, Server, baton_serve, wait_for
from tests.pools import ROLES, Pools

SEED = int(os.environ.get("BATON_CHAOS_SEED", "1"))
KILLS = int(os.environ.get("BATON_CHAOS_KILLS", "30"))
WORKERS, CLIENTS = 2, 12
SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": WORKERS},
    "decode": {"replicas": WORKERS},
    "transport": {"lease_s": 600},  # a block that waits for its lease to run out fails the test
    "limits": {"retry_budget": 50, "engine_hang_s": 4},
    "routing": {"preset": "always-disaggregated"},
    # Streams of up to a second or two, and so few KV blocks that requests wait for them most of the time.
    "simulator": {"step_base_s": 0.02, "num_blocks": 256},
}
SETTINGS["front_end"] = {**SETTINGS["front_end"], "replicas": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two front ends over two workers a pool; no process may be left after it."""
    path: Path = tmp_path_factory.mktemp("chaos") / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        yield server


@pytest.mark.timeout(60 + 30 * KILLS)
def test_nothing_is_lost(server: Server) -> None:
    """Every request ends once, with the undisturbed text, unless its own front end died; then nothing is held."""
    pools, chance = Pools(server), random.Random(SEED)
    mischief = Mischief(server, pools, SEED)
    load = Load(server.url, SEED, CLIENTS)
    load.start()
    began = time.monotonic()
    while mischief.kills < KILLS and not load.unexcused(mischief.front_end_deaths):
        time.sleep(chance.uniform(0.2, 2.5))
        if min(len(server.pids(role)) for role in ROLES) > 1 or chance.random() < 0.2:  # now and then the last one
            mischief.something()
    mischief.over()
    load.stop()
    print(f"seed {SEED}: {time.monotonic() - began:.0f} s, {dict(mischief.done)}, {dict(load.counts())}")
    assert not load.unexcused(mischief.front_end_deaths)
    assert wait_for(pools.quiet, 5), [pools.states(role) for role in ROLES]
    assert wait_for(lambda: all(len(pools.engines(role)) == WORKERS for role in ROLES), 120)
    assert wait_for(lambda: len(server.pids("front-end")) == 2, 120)
    assert wait_for(pools.quiet, 60)  # front ends and workers that came back have been warming each other
    assert pools.leases_expired() == 0
    assert wait_for(lambda: server.values("baton_handoffs_outstanding") == [0.0, 0.0], 60)
    pools.close()
