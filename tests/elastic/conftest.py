"""One server with slow simulated engines and pools of one to four for the whole suite: it takes a minute to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.elastic import SETTINGS
from tests.conftest import Server, baton_serve

GROWS_WITHIN_S = 300.0
"""The decision comes within seconds; a worker's start takes minutes on a machine that has much else to do."""

SHRINKS_WITHIN_S = 180.0


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`baton serve` with the benchmark's settings."""
    path: Path = tmp_path_factory.mktemp("elastic") / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        yield server
