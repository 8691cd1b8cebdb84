"""Fetch a model into the node's cache: resolve its URI, download, check, publish. `baton fetch URI` and warm starts.

The downloads are KServe's own (`kserve-storage`: s3, gs, hf, azure, http, oci, git, …) with the same environment for
credentials, so that what a storage initializer can read this can. What it lacks is here: versions that are really
pinned, a check of what came, going on after a kill, one download for all processes of a node.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from kserve_adapter import integrity
from kserve_adapter.mlflow_registry import PROXY_SCHEME, MLflowRegistry, RegistryError
from kserve_adapter.model_cache import CacheFull, ModelCache

logger = logging.getLogger("baton.storage")

TRIES = 2
"""How often a model is fetched when what came is damaged: a second time, and only what was wrong."""


ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
BOTO_PARTIAL = r"\.[0-9A-Fa-f]{8}$"
"""What boto3 adds to a file's name while it is being fetched."""


class FetchError(Exception):
    """The model can't be had; the message says why."""


def fetch(uri: str, cache: ModelCache, *, with_weights: bool = True) -> Path:
    """The local directory of a model, fetched where it is not in the cache yet.

    Args:
        uri: `s3://bucket/model/version`, `gs://…`, `hf://owner/model:revision`, `oci://…`, `https://…`,
            `models:/name/version` or `models:/name@alias` (MLflow), or a local path, which is used as it is.
        with_weights: False leaves the weights out: all that a front end needs.

    Raises:
        FetchError: not there, not pinned, no access, damaged, or no room.
    """
    if "://" not in uri and not uri.startswith("models:"):
        return _local(uri)
    try:
        registry = MLflowRegistry() if uri.startswith("models:") else None
        pinned = registry.pinned(uri) if registry else check_pinned(uri)
        return cache.model(
            key(pinned, with_weights=with_weights),
            lambda target: _fill(pinned, registry, target, with_weights),
            lambda: _size(pinned, with_weights),
        )
    except (RegistryError, CacheFull, integrity.Damaged) as error:
        raise FetchError(f"{uri}: {error}") from error
    except Exception as error:  # kserve-storage raises what each client library does
        raise FetchError(f"{uri}: {error}") from error


def check_pinned(uri: str) -> str:
    """`uri`, if it says exactly what it means.

    Raises:
        FetchError: for a name without a version where the scheme has versions: a cache would keep an old one for ever.
    """
    if uri.startswith("hf://") and not re.fullmatch(r"hf://[^/]+/[^/:]+:[^/:]+", uri):
        raise FetchError(f"{uri}: add the revision, hf://OWNER/MODEL:REVISION, best the full commit")
    if uri.startswith("oci://") and not re.search(r"(:(?!latest$)[^/:@]+|@sha256:[0-9a-f]{64})$", uri):
        raise FetchError(f"{uri}: add a tag other than `latest`, or a digest (@sha256:…)")
    if uri.startswith("pvc://"):
        raise FetchError(f"{uri}: a volume is mounted, not fetched: mount it and give the path")
    return uri


def key(pinned: str, *, with_weights: bool = True) -> str:
    """The name of a model in the cache: readable, and unique for its URI."""
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", pinned.partition(":")[2]).strip("-.")[-60:].lstrip("-.")
    digest = hashlib.sha256(pinned.encode()).hexdigest()[:12]
    return f"{stem or 'model'}-{digest}{'' if with_weights else '-config'}"


def link(model: Path, name: Path) -> None:
    """Let `name` stand for a model: a symbolic link, replaced at once where there is one already."""
    name.parent.mkdir(parents=True, exist_ok=True)
    fresh = name.with_name(f".{name.name}.{os.getpid()}")
    fresh.symlink_to(model.resolve())
    fresh.replace(name)


def _local(path: str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise FetchError(f"{path}: there is no model (config.json)")
    return Path(path)


def _fill(pinned: str, registry: MLflowRegistry | None, target: Path, with_weights: bool) -> None:
    """Download into `target` until it is whole."""
    logger.info("fetching %s", pinned)
    for attempt in range(TRIES):
        source = registry.artifacts(pinned) if registry else pinned
        if registry and source.startswith(PROXY_SCHEME):
            registry.download(source, target)
        else:
            _download(source, target, with_weights)
        try:
            _make_empty_files(target)
            integrity.check(target, with_weights=with_weights)
            return
        except integrity.Damaged as damage:
            for name in damage.files:
                (target / name).unlink(missing_ok=True)
            if attempt + 1 == TRIES or not damage.files:
                raise
            logger.warning("%s: %s; fetching again", pinned, damage)


def _make_empty_files(target: Path) -> None:
    """Make those that the model was published with: kserve-storage leaves them out."""
    for name, digest in integrity.sums(target).items():
        if digest == integrity.OF_NOTHING and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).touch()


def _download(source: str, target: Path, with_weights: bool) -> None:
    from kserve_storage import Storage  # it brings the cloud's client libraries: only where something is fetched

    ignored = [] if with_weights else list(integrity.WEIGHTS)
    for name, _ in _objects(source) or ():
        integrity.inside(target, name)
    if source.startswith("s3://"):
        # boto3 gives a file its name when it is whole, so what has a name is not fetched again. `config.json` always
        # is: it is small, and to KServe nothing left to fetch is an error.
        for leftover in target.rglob("*"):
            if re.search(BOTO_PARTIAL, leftover.name):
                leftover.unlink()
        names = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
        ignored += [glob.escape(name) for name in names if name != "config.json"]
    Storage.download(directory(source), str(target), ignore_patterns=ignored or None)


def directory(source: str) -> str:
    """`source` with the slash that makes a prefix a directory: without it `…/v1` would fetch `…/v10` as well."""
    if source.startswith(("s3://", "gs://")) and not source.endswith(ARCHIVES):
        return source.rstrip("/") + "/"
    return source


def _size(pinned: str, with_weights: bool) -> int | None:
    """The bytes of a model where its store can be asked."""
    objects = _objects(pinned)
    if objects is None:
        return None
    return sum(size for name, size in objects if with_weights or not integrity.is_weights(name))


def _objects(uri: str) -> list[tuple[str, int]] | None:
    """Name, below the model's prefix, and size of each object of a model; None where a store names none."""
    url = urlparse(directory(uri))
    prefix = url.path.lstrip("/")
    if url.scheme == "s3":
        found = [(item.key, item.size) for item in _s3_bucket(url.netloc).objects.filter(Prefix=prefix)]
    elif url.scheme == "gs":
        found = [(blob.name, blob.size) for blob in _gcs_client().list_blobs(url.netloc, prefix=prefix)]
    else:
        return None
    return [(name.removeprefix(prefix), size) for name, size in found]


def _s3_bucket(name: str) -> Any:
    import boto3
    from kserve_storage import Storage

    return boto3.resource("s3", **Storage._get_s3_client_kwargs()).Bucket(name)


def _gcs_client() -> Any:
    """A client as kserve-storage makes it: without credentials it reads what is public."""
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client()
    except DefaultCredentialsError:
        return storage.Client.create_anonymous_client()
