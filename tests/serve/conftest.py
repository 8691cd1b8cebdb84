"""One server with two simulated engines a pool and an API key, for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Server, baton_serve
from tests.pools import Pools

KEY = "test-key"
SETTINGS = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": 2},
    "decode": {"replicas": 2},
    "routing": {"preset": "always-disaggregated"},
    "transport": {"lease_s": 600},  # a test that waits for a lease to run out fails
    "front_end": {"api_keys_env": "BATON_API_KEYS", "max_body_bytes": 100_000},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`baton serve` with simulated engines; its client sends the key."""
    path: Path = tmp_path_factory.mktemp("serve") / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path, env={"BATON_API_KEYS": KEY}) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="session")
def pools(server: Server) -> Iterator[Pools]:
    """The workers behind the server."""
    pools = Pools(server)
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def nothing_held(pools: Pools) -> Iterator[None]:
    """Every test leaves nothing pinned; a replaced worker may still be warming when it ends."""
    yield
    left = pools.wait_until_free(30)
    assert not left, f"blocks are still held after the test: {[pools.states(role) for role in left]}"
