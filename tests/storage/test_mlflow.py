"""MLflow's registry: pinned versions and aliases, artifacts in a store and artifacts that the server proxies.

A stand-in speaks the documented REST endpoints; a real server is started where `BATON_MLFLOW` names its binary.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import httpx
import pytest

from kserve_adapter.mlflow_registry import MLflowRegistry, RegistryError
from tests.conftest import free_port, wait_for
from tests.storage.conftest import Answering, answers, fetched, make_model, serving

API = "/api/2.0/mlflow"
USER = "Basic " + base64.b64encode(b"reader:secret").decode()


class StandIn(ThreadingHTTPServer):
    """A registry with one model of two versions; version 2 is `champion`."""

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.alias = "2"
        self.sources = {"1": "mlflow-artifacts:/0/run/artifacts/model", "2": "models:/m-logged"}
        self.downloads: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(Answering):
    """MLflow's REST API as its documentation has it."""

    server: StandIn

    def do_GET(self) -> None:
        """Answer the endpoints that a client of the registry needs."""
        url = urlparse(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.headers["Authorization"] != USER:
            self.answer(401, {"message": "who are you?"})
        elif url.path == f"{API}/registered-models/alias" and asked == {"name": "m", "alias": "champion"}:
            self.answer(200, {"model_version": {"name": "m", "version": self.server.alias}})
        elif url.path == f"{API}/model-versions/get-download-uri" and asked.get("version") in self.server.sources:
            self.answer(200, {"artifact_uri": self.server.sources[asked["version"]]})
        elif url.path == f"{API}/logged-models/m-logged":
            self.answer(200, {"model": {"info": {"artifact_uri": "mlflow-artifacts://host/0/run/artifacts/model"}}})
        elif url.path.startswith("/api/2.0/mlflow-artifacts/artifacts"):
            self.artifacts(url.path.removeprefix("/api/2.0/mlflow-artifacts/artifacts"), asked)
        else:
            self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"not found: {asked}"})

    def artifacts(self, path: str, asked: dict[str, str]) -> None:
        """List a directory, or send a file."""
        if path.strip("/"):
            self.server.downloads.append(path)
            self.answer(200, (self.server.files / path.strip("/")).read_bytes())
            return
        folder = self.server.files / asked["path"]
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        listed = [{"path": e.name, "is_dir": e.is_dir(), "file_size": e.stat().st_size} for e in entries]
        self.answer(200, {"files": listed})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, and the environment of a client of it."""
    model = make_model(tmp_path / "files/0/run/artifacts/model")
    (model / "extra").mkdir()
    (model / "extra" / "file.txt").write_text("x")
    with serving(StandIn(tmp_path / "files")) as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


def environment(url: str) -> dict[str, str]:
    """What MLflow's own client reads."""
    return {
        "MLFLOW_TRACKING_URI": url,
        "MLFLOW_TRACKING_USERNAME": "reader",
        "MLFLOW_TRACKING_PASSWORD": "secret",
    }


def test_an_alias_is_pinned(registry: StandIn) -> None:
    """It stands for the version that it names now."""
    client = MLflowRegistry()
    assert client.pinned("models:/m@champion") == "models:/m/2"
    registry.alias = "3"
    assert client.pinned("models:/m@champion") == "models:/m/3"
    assert client.pinned("models:/m/1") == "models:/m/1"


def test_a_logged_model_is_followed(registry: StandIn) -> None:
    """MLflow 3: a version's source is a logged model, which has the artifacts."""
    assert MLflowRegistry().artifacts("models:/m/2") == "mlflow-artifacts://host/0/run/artifacts/model"


@pytest.mark.parametrize("uri", ["models:/m", "models:/m/latest", "models:/m/Production", "models:/m@other"])
def test_what_is_not_pinned_or_not_there(registry: StandIn, uri: str) -> None:
    """No version, a stage in its place, an alias that does not exist."""
    with pytest.raises(RegistryError):
        MLflowRegistry().pinned(uri)


def test_wrong_credentials_are_told(registry: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the server's own words, without the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-one")
    with pytest.raises(RegistryError, match=r"who are you\? \(401\)") as problem:
        MLflowRegistry().pinned("models:/m@champion")
    assert "wrong-one" not in str(problem.value)


@pytest.mark.parametrize("uri", ["models:/m/1", "models:/m@champion"])
def test_a_model_through_the_proxy(registry: StandIn, tmp_path: Path, uri: str) -> None:
    """`baton fetch` of proxied artifacts: whole, with folders, once."""
    status, directory, err = fetched(uri, tmp_path / "cache", environment(registry.url))
    assert status == 0, err
    model = registry.files / "0/run/artifacts/model"
    for path in (p for p in model.rglob("*") if p.is_file()):
        assert (Path(directory) / path.relative_to(model)).read_bytes() == path.read_bytes()
    assert len(registry.downloads) == len(set(registry.downloads))
    before = len(registry.downloads)
    assert fetched(uri, tmp_path / "cache", environment(registry.url))[1] == directory
    assert len(registry.downloads) == before


@pytest.mark.parametrize("path", ["../../victim", "/{}/victim"])
def test_a_server_that_names_paths_outside(registry: StandIn, tmp_path: Path, path: str) -> None:
    """Nothing is written outside of the cache, whatever a server lists."""
    path = path.format(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "artifacts", lambda self, _, asked: self.answer(200, {"files": [{"path": path}]}))
        status, _, err = fetched("models:/m/1", tmp_path / "cache", environment(registry.url))
    assert status == 1 and ("named the path" in err or "outside of itself" in err)
    assert not list(tmp_path.rglob("victim"))


def test_a_real_server(tmp_path: Path) -> None:
    """MLflow itself: register two versions of a model, set an alias, fetch by both."""
    binary = os.environ.get("BATON_MLFLOW") or shutil.which("mlflow")
    if not binary:
        pytest.skip("no MLflow: name its binary with BATON_MLFLOW (in an environment of its own)")
    port = free_port()
    command = [binary, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "store"),
    ]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True)
    try:
        assert wait_for(lambda: answers(f"{url}/health"), 400), (tmp_path / "mlflow.log").read_text()
        models = [make_model(tmp_path / f"model-{number}") for number in (1, 2)]
        with httpx.Client(base_url=url, timeout=60) as client:
            register(client, models)
        for uri, model in (("models:/m/1", models[0]), ("models:/m@champion", models[1]), ("models:/m/2", models[1])):
            status, directory, err = fetched(uri, tmp_path / "cache", {"MLFLOW_TRACKING_URI": url})
            assert status == 0, err
            assert (Path(directory) / "model-0.safetensors").read_bytes() == (
                model / "model-0.safetensors"
            ).read_bytes()
        status, _, err = fetched("models:/m/9", tmp_path / "cache", {"MLFLOW_TRACKING_URI": url})
        assert status == 1 and "models:/m/9" in err
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def register(client: httpx.Client, models: list[Path]) -> None:
    """Make each of them a version of the model `m`, and the second one its champion."""
    call(client, "POST", "registered-models/create", name="m")
    for model in models:
        run = call(client, "POST", "runs/create", experiment_id="0")["run"]["info"]
        root = run["artifact_uri"].removeprefix("mlflow-artifacts:").strip("/")
        for path in model.iterdir():
            put = client.put(f"/api/2.0/mlflow-artifacts/artifacts/{root}/model/{path.name}", content=path.read_bytes())
            put.raise_for_status()
        call(
            client,
            "POST",
            "model-versions/create",
            name="m",
            source=f"{run['artifact_uri']}/model",
            run_id=run["run_id"],
        )
    call(client, "POST", "registered-models/alias", name="m", alias="champion", version="2")


def call(client: httpx.Client, method: str, path: str, **body: str) -> Any:
    """One call of MLflow's API."""
    response = client.request(method, f"{API}/{path}", json=body)
    response.raise_for_status()
    return response.json()
