"""`baton top`: the fleet live in the terminal, from a front end's `/baton/fleet`."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runtime.errors import BatonError
from runtime.front_end_client import KEY_ENV, NoAnswer, ask

TIMEOUT_S = 5.0

STATE_STYLES = {"ready": "green", "warming": "yellow", "connecting": "yellow", "draining": "cyan", "refused": "red"}

Snapshot = dict[str, Any]
SHAPE = {"latency": dict, "waiting": dict, "refusals": dict, "pools": dict, "workers": list, "recent": list}
"""What `render` reads."""


class Unreachable(BatonError):
    """No fleet to show at this address; the message says why."""


def top(url: str, every_s: float, *, once: bool = False, console: Console | None = None) -> int:
    """Show the fleet behind the front end at `url` until Ctrl-C, or once. The API key comes from BATON_API_KEY.

    Raises:
        Unreachable: at the first look; later ones keep what was last seen and say so.
    """
    console = console or Console()
    snapshot = fetch(url)
    if once:
        console.print(render(snapshot))
        return 0
    try:
        with Live(render(snapshot), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                try:
                    snapshot = fetch(url)
                    live.update(render(snapshot), refresh=True)
                except Unreachable as error:
                    live.update(Group(Text(str(error), style="red"), render(snapshot)), refresh=True)
    except KeyboardInterrupt:
        return 0


def fetch(url: str) -> Snapshot:
    """The fleet as a front end knows it.

    Raises:
        Unreachable: with the reason.
    """
    try:
        status, snapshot = ask(f"{url.rstrip('/')}/baton/fleet", os.environ.get(KEY_ENV), TIMEOUT_S)
    except NoAnswer as error:
        raise Unreachable(f"no front end of Baton at {url}: {error}") from error
    if status >= 400:
        hint = f": set {KEY_ENV}" if status == 401 else ""
        raise Unreachable(f"{url} answers {status}{hint}")
    if not isinstance(snapshot, dict) or any(not isinstance(snapshot.get(key), kind) for key, kind in SHAPE.items()):
        raise Unreachable(f"no front end of Baton at {url}: what it tells is no fleet")
    return snapshot


def render(snapshot: Snapshot) -> Group:
    """The snapshot as tables."""
    latency, waiting = snapshot["latency"], snapshot["waiting"]
    head = Text(
        f"{waiting['requests']} requests wait here ({waiting['tokens']} tokens)   "
        f"refused: {_refused(snapshot['refusals'])}   "
        f"lately: first token {_seconds(latency['ttft_s'])}, between tokens {_seconds(latency['itl_s'])}"
    )
    return Group(head, _pools(snapshot), _workers(snapshot), _recent(snapshot))


def _pools(snapshot: Snapshot) -> Table:
    table = Table(title="Pools", title_justify="left", expand=True)
    for column in (
        "pool",
        "ready",
        "starting",
        "draining",
        "desired",
        "queue",
        "backlog",
        "streams",
        "tokens/s",
        "KV",
        "why",
    ):
        table.add_column(column, justify="left" if column in ("pool", "why") else "right")
    for name, pool in snapshot["pools"].items():
        load, answer = pool["load"], pool["answer"]
        tokens_s = load["arriving_tokens_s"] if name == "prefill" else load["tokens_s"]
        table.add_row(
            name,
            str(load["ready"]),
            str(load["starting"]),
            str(load["draining"]),
            str(answer["workers"]),
            str(load["queued_requests"]),
            _seconds(load["backlog_s"]),
            str(load["streams"]),
            f"{tokens_s:,.0f}",
            f"{load['kv_use']:.0%}",
            f"{answer['reason']}: {answer['why']}" if pool["scaled"] else "not scaled",
        )
    return table


def _workers(snapshot: Snapshot) -> Table:
    table = Table(title="Workers", title_justify="left", expand=True)
    for column in ("worker", "pool", "state", "queued requests", "queued tokens", "streams", "KV"):
        table.add_column(column, justify="left" if column in ("worker", "pool", "state") else "right")
    for worker in sorted(snapshot["workers"], key=lambda worker: (worker["role"] != "prefill", worker["engine_id"])):
        state = worker["state"]
        table.add_row(
            worker["engine_id"][:12],
            worker["role"],
            Text(state, style=STATE_STYLES.get(state, "")),
            str(worker["queued_requests"]),
            str(worker["queued_tokens"] or 0),
            str(worker["streams"]),
            _held(worker),
        )
    return table


def _recent(snapshot: Snapshot) -> Table:
    table = Table(title="Recently", title_justify="left", expand=True)
    for column in ("when", "pool", "worker", "what"):
        table.add_column(column)
    for event in list(snapshot["recent"])[-8:]:
        style = "red" if event["what"].startswith("lost") else ""
        when = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        table.add_row(when, event["pool"], event["engine_id"][:12], Text(event["what"], style=style))
    return table


def _refused(refusals: dict[str, float]) -> str:
    return ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(refusals.items()) if count) or "none"


def _held(worker: dict[str, Any]) -> str:
    if worker["free_blocks"] is None or not worker["num_blocks"]:
        return "-"
    return f"{1.0 - worker['free_blocks'] / worker['num_blocks']:.0%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
