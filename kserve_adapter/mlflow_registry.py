"""Models of an MLflow registry, over its REST API: what a version or an alias stands for, and artifacts it proxies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from kserve_adapter.integrity import inside

API = "/api/2.0/mlflow"
PROXY = "/api/2.0/mlflow-artifacts/artifacts"
PROXY_SCHEME = "mlflow-artifacts:"
TIMEOUT_S = 30.0


class RegistryError(Exception):
    """The registry has not got the model, or can't be asked; the message says which."""


class MLflowRegistry:
    """A tracking server's registry.

    Args:
        url: the server, by default `$MLFLOW_TRACKING_URI`. `$MLFLOW_TRACKING_TOKEN`, or `$MLFLOW_TRACKING_USERNAME`
            and `$MLFLOW_TRACKING_PASSWORD`, are sent where they are set, as MLflow's own client does.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or os.environ.get("MLFLOW_TRACKING_URI")
        if not url:
            raise RegistryError("set MLFLOW_TRACKING_URI to the address of the MLflow server")
        auth, headers = None, {}
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, auth=auth, timeout=TIMEOUT_S)

    def pinned(self, uri: str) -> str:
        """`models:/name/version` for that or for `models:/name@alias`: an alias moves, what is cached must not.

        Raises:
            RegistryError: for another form, or an alias that is not there.
        """
        match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
        if match is None:
            raise RegistryError(f"{uri}: write models:/NAME/VERSION (a number) or models:/NAME@ALIAS")
        name, version, alias = match.groups()
        if alias:
            answer = self._get(f"{API}/registered-models/alias", name=name, alias=alias)
            version = answer["model_version"]["version"]
        return f"models:/{name}/{version}"

    def artifacts(self, pinned: str) -> str:
        """Where the files of a pinned version are: `s3://…` and the like, or `mlflow-artifacts:…` for `download`."""
        name, version = pinned.removeprefix("models:/").rsplit("/", 1)
        uri = str(self._get(f"{API}/model-versions/get-download-uri", name=name, version=version)["artifact_uri"])
        if logged := re.fullmatch(r"models:/(m-[^/]+)", uri):  # MLflow 3: the version points to a logged model
            uri = str(self._get(f"{API}/logged-models/{logged[1]}")["model"]["info"]["artifact_uri"])
        return uri

    def download(self, uri: str, target: Path) -> None:
        """Fetch artifacts that the server proxies (`mlflow-artifacts:/…`), all but those that are there already."""
        root = re.sub(r"^mlflow-artifacts:(//[^/]*)?", "", uri).strip("/")
        files = self._files(root)
        if not files:
            raise RegistryError(f"{uri}: there are no files")
        for path in files:
            local = inside(target, path.removeprefix(f"{root}/"))
            if not local.is_file():
                local.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(path, local)

    def _files(self, directory: str) -> list[str]:
        found = []
        for entry in self._get(PROXY, path=directory).get("files", []):
            # A server names entries relative to the directory that was asked for.
            path = f"{directory}/{str(entry['path']).removeprefix(f'{directory}/')}"
            if ".." in path.split("/"):
                raise RegistryError(f"the server named the path {path!r}")
            found += self._files(path) if entry.get("is_dir") else [path]
        return found

    def _fetch(self, path: str, local: Path) -> None:
        partial = local.with_name(f".{local.name}.partial")
        with self._client.stream("GET", f"{PROXY}/{quote(path)}") as response, partial.open("wb") as file:
            _check(response, path)
            for chunk in response.iter_bytes(1 << 20):
                file.write(chunk)
        partial.rename(local)

    def _get(self, route: str, **params: str) -> dict[str, Any]:
        try:
            response = self._client.get(route, params=params)
        except httpx.TransportError as error:
            raise RegistryError(f"{self._client.base_url} can't be reached: {error}") from error
        _check(response, str(params))
        answer: dict[str, Any] = response.json()
        return answer


def _check(response: httpx.Response, what: str) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    raise RegistryError(f"{what}: {message} ({response.status_code})")
