"""Google's object store: a stand-in that speaks the three requests of its JSON API which a fetch makes."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from tests.storage.conftest import Answering, fetched, make_model, serving

BUCKET = "models"


class StandIn(ThreadingHTTPServer):
    """A store of one bucket."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.env = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.server_port}"}

    def upload(self, model: Path, prefix: str) -> str:
        """Put a model under a prefix; its URI."""
        for path in model.rglob("*"):
            self.objects[f"{prefix}/{path.relative_to(model)}"] = path.read_bytes()
        return f"gs://{BUCKET}/{prefix}"


class Handler(Answering):
    """List objects by prefix; send one."""

    server: StandIn

    def do_GET(self) -> None:
        """Answer a listing or a download."""
        url = urlparse(self.path)
        listing = f"/storage/v1/b/{BUCKET}/o"
        if url.path == listing:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            found = {name: body for name, body in self.server.objects.items() if name.startswith(prefix)}
            items = [{"name": name, "size": str(len(body)), "bucket": BUCKET} for name, body in sorted(found.items())]
            self.answer(200, {"items": items})
        elif (name := unquote(url.path.removeprefix(f"/download{listing}/"))) in self.server.objects:
            self.server.downloads.append(name)
            self.answer(200, self.server.objects[name])
        else:
            self.answer(404, {})


@pytest.fixture
def store() -> Iterator[StandIn]:
    """An empty store."""
    with serving(StandIn()) as server:
        yield server


def test_a_pinned_version(store: StandIn, tmp_path: Path) -> None:
    """What is under the prefix comes, and nothing of the version whose name begins alike."""
    model = make_model(tmp_path / "model")
    uri = store.upload(model, "llama/v1")
    store.objects["llama/v10/other"] = b"x"
    status, directory, err = fetched(uri, tmp_path / "cache", store.env)
    assert status == 0, err
    came = {path.name: path.read_bytes() for path in Path(directory).iterdir() if not path.name.startswith(".")}
    assert came == {path.name: path.read_bytes() for path in model.iterdir()}


def test_names_that_lead_outside(store: StandIn, tmp_path: Path) -> None:
    """A store may hold any name; nothing is written outside of the cache."""
    uri = store.upload(make_model(tmp_path / "model"), "outside")
    store.objects["outside/a/../../../victim"] = b"x"
    status, _, err = fetched(uri, tmp_path / "cache", store.env)
    assert status == 1 and "outside of itself" in err, err
    assert not list(tmp_path.rglob("victim"))


def test_no_room(store: StandIn, tmp_path: Path) -> None:
    """A model that does not fit is refused before any of it has come."""
    uri = store.upload(make_model(tmp_path / "model"), "large")
    status, _, err = fetched(uri, tmp_path / "cache", store.env, "--max-bytes", "100000")
    assert status == 1 and "the cache has room for" in err, err
    assert not store.downloads
