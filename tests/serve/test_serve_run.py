"""Ray Serve's own command runs Baton from a file of applications, as `serve deploy` and a RayService do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import MODEL, ROOT, Server, free_port, serving, wait_for

START_S = 180.0


@pytest.fixture(autouse=True)
def nothing_held() -> None:
    """The suite's own server has no part in this."""


@pytest.fixture
def ray_dir() -> Iterator[str]:
    """A directory for a Ray cluster of its own; short, for the sockets in it."""
    folder = tempfile.mkdtemp(prefix="bt-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def healthy(server: Server) -> bool:
    """Whether the front end is up and both pools can serve."""
    try:
        return server.client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def test_serve_run(tmp_path: Path, ray_dir: str) -> None:
    """Under a name and a port of Ray Serve's, behind its proxy: answers, and nothing stays behind."""
    port = free_port()
    applications = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "runtime.app:build",
                "args": {"config": str(ROOT / "deploy/config/sim.yaml")},
            }
        ],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(applications))
    env = {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray_dir}
    with serving(["serve", "run", str(path)], port, "Submitted deploy config", env=env) as server:
        assert wait_for(lambda: healthy(server), START_S)
        assert server.complete([2000, 2001], max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == [MODEL]
        body = {"model": MODEL, "prompt": [2000], "max_tokens": 3, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
