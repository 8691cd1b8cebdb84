"""One server with real engines for the whole suite: they take a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.conftest import ROOT, Server, baton_serve
from tests.pools import Pools

FREE_S = 30.0
"""An abandoned prompt may have to be read to its end first; much less than the lease of the demo's settings."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`make serve` as a user runs it, but that every prompt that can be is disaggregated.

    After the suite no engine holds a block and no process is left.
    """
    settings = yaml.safe_load((ROOT / "deploy/config/demo.yaml").read_text())
    path = tmp_path_factory.mktemp("engine") / "settings.yaml"
    path.write_text(yaml.safe_dump({**settings, "routing": {"preset": "always-disaggregated"}}))
    with baton_serve(path) as server:
        yield server


@pytest.fixture(scope="session")
def pools(server: Server) -> Iterator[Pools]:
    """The workers behind the server."""
    pools = Pools(server)
    yield pools
    left = pools.wait_until_free(FREE_S)
    pools.close()
    assert not left, f"blocks are still held after the suite by {left}"


@pytest.fixture(autouse=True)
def nothing_held(pools: Pools) -> Iterator[None]:
    """Every test starts with empty caches and leaves nothing pinned."""
    assert not pools.wait_until_free(FREE_S), "blocks were held before the test"
    yield
    left = pools.wait_until_free(FREE_S)
    assert not left, f"blocks are still held after the test by {left}"
