"""`baton serve | check | explain | top | fetch | manifest | canary`: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from kserve_adapter.canary.command import add_canary
from kserve_adapter.commands import add_fetch, add_manifest
from runtime import explain_command
from runtime.arguments import number
from runtime.config import ROLES, Config
from runtime.config_file import listening_at, load
from runtime.errors import BatonError

A_DAY_S = 86_400


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="baton", description="Serve a large language model on prefill and decode pools."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until Ctrl-C, on a Ray cluster of its own or a running one")
    serve.add_argument("--config", required=True, metavar="FILE", help="settings (YAML)")
    serve.add_argument("--host", help="listen here instead of front_end.host")
    serve.add_argument("--port", type=int, help="listen here instead of front_end.port")
    serve.add_argument("--address", help="join the Ray cluster at this address (`auto` finds it)")
    check = commands.add_parser(
        "check", help="check settings and print them resolved, with each role's engine arguments"
    )
    check.add_argument("config", metavar="FILE", help="settings (YAML)")
    watch = commands.add_parser("top", help="show the fleet live in the terminal")
    watch.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="a front end; default %(default)s")
    pause = number(float, over=0, under=A_DAY_S)
    watch.add_argument("--every", type=pause, default=1.0, metavar="SECONDS", help="look so often; default %(default)s")
    watch.add_argument("--once", action="store_true", help="print the fleet once")
    explain_command.add_parser(commands)
    add_fetch(commands)
    add_manifest(commands)
    add_canary(commands)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "explain":
            return explain_command.run(arguments)
        if run := getattr(arguments, "run", None):
            return int(run(arguments))
        if arguments.command == "top":
            from runtime.top import top

            return top(arguments.url, arguments.every, once=arguments.once)
        config = load(arguments.config)
        if arguments.command == "check":
            return _check(config)
        from runtime.serving import serve_until_stopped

        changes = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
        return serve_until_stopped(listening_at(config, **changes), arguments.address)
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        return 2


def _check(config: Config) -> int:
    from kv_transfer.vllm_engine import engine_args

    resolved = {
        "settings": config.model_dump(),
        "engine_args": {role: engine_args(config.engine_settings(role)) for role in ROLES},
        "grace_periods": asdict(config.limits.grace),
        "engine_env": {role: config.engine_settings(role).env for role in ROLES},
    }
    config.api_keys()
    print(json.dumps(resolved, indent=2, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
