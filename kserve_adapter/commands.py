"""`baton fetch | manifest`: the commands that belong to Kubernetes."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from kserve_adapter.model_cache import ModelCache
from runtime.config_file import load
from runtime.demo_model import cache_dir
from runtime.errors import ConfigError


def add_fetch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`baton fetch URI`."""
    parser = commands.add_parser("fetch", help="fetch a model into the node's cache and print its directory")
    parser.add_argument("uri", help="s3://, gs://, hf://, oci://, https://, models:/NAME/VERSION, models:/NAME@ALIAS")
    parser.add_argument(
        "--cache", type=Path, default=cache_dir() / "fetched", metavar="DIR", help="the cache (default: %(default)s)"
    )
    parser.add_argument("--max-bytes", type=int, metavar="N", help="what all models in the cache may take together")
    parser.add_argument(
        "--keep-hours", type=float, default=168.0, metavar="H",
        help="a model that was asked for within this time is not removed to make room (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--link", type=Path, metavar="PATH", help="a symbolic link to make to the model")
    parser.add_argument("--without-weights", action="store_true", help="only what a front end needs")
    parser.set_defaults(run=_fetch)


def add_manifest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`baton manifest`."""
    parser = commands.add_parser("manifest", help="print the Kubernetes objects of a settings file")
    parser.add_argument("--config", required=True, metavar="FILE", help="settings (YAML) with a `kubernetes` section")
    parser.add_argument("--canary", metavar="FILE", help="settings of a second revision")
    parser.add_argument("--percent", type=int, default=10, help="share of requests for the canary (default: 10)")
    parser.set_defaults(run=_manifest)


def _manifest(arguments: argparse.Namespace) -> int:
    from kserve_adapter.manifest.render import render, to_yaml

    if not 0 <= arguments.percent <= 100:
        raise ConfigError("--percent is a share of 100")
    canary = load(arguments.canary) if arguments.canary else None
    print(to_yaml(render(load(arguments.config), canary, arguments.percent)), end="")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from kserve_adapter.storage import FetchError, fetch, link

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")  # to stderr
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cache = ModelCache(arguments.cache, arguments.max_bytes, arguments.keep_hours * 3600)
    try:
        model = fetch(arguments.uri, cache, with_weights=not arguments.without_weights)
        if arguments.link:
            link(model, arguments.link)
    except (FetchError, OSError) as error:
        print(f"baton: {error}", file=sys.stderr)
        return 1
    print(model)
    return 0
