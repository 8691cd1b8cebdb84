"""`python -m kserve_adapter`: a predictor of KServe's that serves through Baton's pools."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kserve.errors import ModelNotReady, ServerNotReady
from kserve.logging import configure_logging
from kserve.logging import logger as kserve_logger
from kserve.model_server import parser as kserve_parser

from kserve_adapter.model import BatonModel
from kserve_adapter.revision import Revision, revision_name
from kserve_adapter.server import OPENAI_PREFIX, Server
from runtime.config import Config
from runtime.config_file import load, parse
from runtime.errors import ConfigError
from runtime.scaling_follower import SCALER

if TYPE_CHECKING:
    from runtime.frontend import FrontEnd


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """KServe's own arguments, and Baton's."""
    parser = argparse.ArgumentParser(prog="kserve_adapter", description=__doc__, parents=[kserve_parser])
    parser.add_argument("--config_file", metavar="FILE", help="Baton's settings (YAML)")
    parser.add_argument("--model_dir", help="the model's directory, in place of the settings' `model`")
    parser.add_argument(
        "--ray_address",
        default=os.environ.get("BATON_RAY_ADDRESS") or None,
        help="HOST:PORT of the Ray cluster's head; `auto` where a node of it runs on this machine; without it "
        "everything runs in this pod (default: $BATON_RAY_ADDRESS)",
    )
    parser.add_argument("--application", help="name of the revision's application (default: named by its settings)")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")  # noqa: S104  # what probes need
    parser.add_argument(
        "--openai_prefix",
        default=os.environ.get("KSERVE_OPENAI_ROUTE_PREFIX", OPENAI_PREFIX),
        help="where the OpenAI API is to be had beside /openai; empty is the root",
    )
    parser.add_argument(
        "--grace_period",
        type=int,
        help="how long streams may run on after SIGTERM, in s (default: as limits.drain_s in the settings has it)",
    )
    parser.add_argument(
        "--linger_s", type=float, default=120.0, help="how long the application outlives its last predictor, in s"
    )
    parser.set_defaults(model_name=None)
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> Config:
    """The settings that the arguments make of the file.

    Raises:
        ConfigError: as `load`, and for a model directory without a model.
    """
    config = load(args.config_file) if args.config_file else parse({})
    config = _changed(config, model=args.model_dir, served_model_name=args.model_name)
    if args.model_dir and not (Path(args.model_dir) / "config.json").is_file():
        raise ConfigError(f"--model_dir: there is no model (config.json) in {args.model_dir}")
    config.api_keys()
    # After the model's name is fixed: a directory such as /mnt/models names nothing.
    config = _changed(config, served_model_name=config.model_name)
    return _changed(config, name=args.application or revision_name(config))


def grace_s(args: argparse.Namespace, config: Config) -> int:
    """How long streams may run on after SIGTERM, in whole seconds: as given, or as the settings have it."""
    given: int | None = args.grace_period
    return math.ceil(config.limits.grace.serve_s) if given is None else given


def _changed(config: Config, **changes: str | None) -> Config:
    return parse({**config.model_dump(), **{name: value for name, value in changes.items() if value}}, "arguments")


def _is_news(record: logging.LogRecord) -> bool:
    """Not a probe's 503: KServe logs a traceback for each of them, and a start has many."""
    return not (record.exc_info and isinstance(record.exc_info[1], ModelNotReady | ServerNotReady))


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; returns the exit status."""
    args = arguments(argv)
    configure_logging(args.log_config_file)
    kserve_logger.addFilter(_is_news)
    for name in ("baton", "vllm"):
        logger = logging.getLogger(name)
        logger.parent, logger.level = kserve_logger, logging.INFO
    try:
        config = settings(args)
    except ConfigError as error:
        print(f"kserve_adapter: {error}", file=sys.stderr)
        return 2
    revision = Revision(config, args.ray_address, args.linger_s, lambda: server.register_signal_handler())

    async def start() -> FrontEnd:
        handles = await revision.open()
        scaler = handles.pop(SCALER)
        # vLLM takes its time to import, and probes are to be answered meanwhile.
        front_end = await asyncio.to_thread(__import__, "runtime.frontend", fromlist=["start_front_end"])
        started: FrontEnd = await revision.unless_it_fails(front_end.start_front_end(config, handles, scaler))
        return started

    server = Server(
        BatonModel(config.model_name),
        start,
        revision.close,
        host=args.host,
        prefix=_prefix(args.openai_prefix),
        max_body_bytes=config.front_end.max_body_bytes,
        grace_s=grace_s(args, config),
        with_grpc=args.enable_grpc,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
    )
    try:
        return server.run()
    finally:
        revision.leave_cluster()


def _prefix(prefix: str) -> str:
    return f"/{prefix.strip('/')}" if prefix.strip("/") else ""


if __name__ == "__main__":
    sys.exit(main())
