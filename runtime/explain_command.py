"""`baton explain`: ask a running front end why a request went where it did, or where one would go."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.parse
from typing import Any

from runtime.arguments import number
from runtime.config_file import load
from runtime.errors import ConfigError
from runtime.front_end_client import KEY_ENV, NoAnswer, ask

TIMEOUT_S = 10.0


def add_parser(commands: Any) -> None:
    """Add the command to `baton`."""
    parser = commands.add_parser(
        "explain", help="why a request was put where it was, or where a prompt of some length would go"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", metavar="FILE", help="settings (YAML) of the running server: its address and key")
    where.add_argument("--url", help=f"the server, such as http://127.0.0.1:8000; its key is read from {KEY_ENV}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--request", metavar="ID", help="id of a response, or the X-Request-Id that was sent")
    what.add_argument("--tokens", type=number(int), metavar="N", help="length of a prompt")
    parser.add_argument(
        "--cached", action="append", default=[], metavar="ENGINE=TOKENS", help="what an engine holds of that prompt"
    )
    parser.add_argument("--json", action="store_true", help="print the server's answer as it is")


def run(arguments: argparse.Namespace) -> int:
    """Ask and print; returns the exit status.

    Raises:
        ConfigError: the settings or the arguments are wrong.
    """
    url, key = _server(arguments)
    if arguments.request:
        query = [("request", arguments.request)]
    else:
        query = [("tokens", str(arguments.tokens))]
        for held in arguments.cached:
            engine, _, tokens = held.rpartition("=")
            if not engine or not tokens.isdigit():
                raise ConfigError(f"--cached wants ENGINE=TOKENS, not {held}")
            query.append(("cached", f"{engine}:{tokens}"))
    status, answer = _get(f"{url}/baton/explain?{urllib.parse.urlencode(query)}", key)
    if status != 200:
        error = answer.get("error", answer)
        print(f"baton: {error.get('message') if isinstance(error, dict) else error}", file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=2) if arguments.json else table(answer))
    return 0


def _server(arguments: argparse.Namespace) -> tuple[str, str | None]:
    if arguments.url:
        return arguments.url.rstrip("/"), os.environ.get(KEY_ENV)
    config = load(arguments.config)
    host = "127.0.0.1" if config.front_end.host in ("0.0.0.0", "::") else config.front_end.host  # noqa: S104  # compared
    return f"http://{host}:{config.front_end.port}", next(iter(config.api_keys()), None)


def _get(url: str, key: str | None) -> tuple[int, dict[str, Any]]:
    server = url.partition("/baton/")[0]
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no HTTP address")
    try:
        status, answer = ask(url, key, TIMEOUT_S)
    except NoAnswer as error:
        raise ConfigError(f"no server of Baton answers at {server}: {error}") from error
    if status >= 400:
        return status, answer if isinstance(answer, dict) else {"error": f"the server answers {status}"}
    if not _explains(answer):
        raise ConfigError(f"no server of Baton answers at {server}: what it tells is no explanation")
    return 200, answer


def _explains(answer: Any) -> bool:
    """Whether it is what `table` reads."""
    if not isinstance(answer, dict) or not answer.keys() >= {"prompt_tokens", "answer", "meaning", "candidates"}:
        return False
    chosen, candidates = answer["answer"], answer["candidates"]
    if not isinstance(chosen, dict) or not isinstance(candidates, list):
        return False
    return chosen.keys() & {"plan", "refused"} != set() and all(isinstance(plan, dict) for plan in candidates)


def table(answer: dict[str, Any]) -> str:
    """The answer and its candidates as text."""
    lines = [f"prompt of {answer['prompt_tokens']} tokens"]
    if request := answer.get("request"):
        took = answer["ttft_s"]
        lines[0] += f", request {request}, " + (f"first token after {took:.3f} s" if took else "no token yet")
    chosen = answer["answer"]
    if "refused" in chosen:
        return "\n".join([*lines, answer["meaning"]])
    lines += [f"{chosen['plan']}: {answer['meaning']}", ""]
    lines.append(f"{'plan':14}{'prefill':14}{'decode':14}{'ttft s':>8}{'itl ms':>8}{'gap ms':>8}"
                 f"{'uncached':>10}{'pulled':>8}{'backlog s':>10}{'streams':>9}  why")  # fmt: skip
    for plan in answer["candidates"]:
        lines.append(f"{plan['plan']:14}{_short(plan['prefill']):14}{_short(plan['decode']):14}"
                     f"{plan['ttft_s']:8.3f}{plan['itl_s'] * 1e3:8.1f}{plan['gap_s'] * 1e3:8.1f}"
                     f"{plan['uncached_tokens']:10}{plan['pulled_tokens']:8}{plan['backlog_s']:10.3f}"
                     f"{plan['streams']:9}  {plan['why']}")  # fmt: skip
    return "\n".join(lines)


def _short(engine_id: str | None) -> str:
    return "-" if engine_id is None else engine_id[:12]
