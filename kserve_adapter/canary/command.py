"""`baton canary judge | watch`: exit status 0 promote, 10 hold, 20 roll back, 30 when there is no evidence.

Wrong arguments are 2, as everywhere, and a fault of ours is Python's 1: neither is a verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields

from kserve_adapter.canary.judge import Judgement, JudgeSettings, NoEvidence, Verdict, judge
from runtime.arguments import number

EXIT = {Verdict.PROMOTE: 0, Verdict.HOLD: 10, Verdict.ROLLBACK: 20}
NO_EVIDENCE = 30

LIMITS = {
    "alpha": number(float, over=0, under=1),
    "beta": number(float, over=0, under=1),
    "min_requests": number(int),
    "min_minutes": number(float),
    "error_margin": number(float, under=1),
    "latency_margin": number(float),
    "speed_margin": number(float, under=1),
}
"""What each of `JudgeSettings` may be on the command line."""

YEAR_H = 24 * 366


def add_canary(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`baton canary`."""
    canary = commands.add_parser("canary", help="judge a new revision against the one it is to replace")
    actions = canary.add_subparsers(dest="action", required=True)
    judging = actions.add_parser("judge", help="look once: status 0 promote, 10 hold, 20 roll back, 30 no evidence")
    watching = actions.add_parser("watch", help="look again and again until it is decided, or the time is over")
    for parser in (judging, watching):
        parser.add_argument("--prometheus", required=True, metavar="URL")
        parser.add_argument("--name", required=True, help="the InferenceService")
        parser.add_argument("--stable", required=True, metavar="REVISION")
        parser.add_argument("--canary", required=True, metavar="REVISION")
        for field in fields(JudgeSettings):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=LIMITS[field.name], default=field.default, metavar="N")
        whole = number(int, least=1)
        parser.add_argument("--step-s", type=whole, default=60, metavar="N", help="compare speeds over so many seconds")
    minutes, hours = number(float, over=0, under=60 * YEAR_H), number(float, under=YEAR_H)
    judging.add_argument("--minutes", type=minutes, default=60.0, help="look at so much of the past (default: 60)")
    watching.add_argument("--hours", type=hours, default=24.0, help="how long to watch at most (default: 24)")
    every = number(float, over=0, under=3600 * YEAR_H)
    watching.add_argument("--every-s", type=every, default=60.0, help="seconds between looks (default: 60)")
    judging.set_defaults(run=_judge)
    watching.set_defaults(run=_watch)


def _judge(arguments: argparse.Namespace) -> int:
    try:
        judgement = _look(arguments, arguments.minutes)
    except NoEvidence as error:
        print(f"baton: {error}", file=sys.stderr)
        return NO_EVIDENCE
    _tell(judgement)
    return EXIT[judgement.verdict]


def _watch(arguments: argparse.Namespace) -> int:
    return watch(
        lambda minutes: _look(arguments, minutes), arguments.hours * 60, arguments.every_s, time.monotonic, time.sleep
    )


def watch(
    look: Callable[[float], Judgement],
    minutes: float,
    every_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    """Look until it is decided; at the end of the time what is not decided is held. Returns the exit status.

    A Prometheus that does not answer is asked again: it is no reason to end a watch of a day.
    """
    started = clock()
    last: Verdict | None = None
    status = NO_EVIDENCE
    while True:
        passed = (clock() - started) / 60
        try:
            judgement = look(max(1.0, passed))
            status = EXIT[judgement.verdict]
            if judgement.verdict is not last:
                _tell(judgement)
            last = judgement.verdict
            if last is not Verdict.HOLD:
                return status
        except NoEvidence as error:
            print(f"baton: {error}", file=sys.stderr)
        if passed >= minutes:
            return status
        sleep(every_s)


def _look(arguments: argparse.Namespace, minutes: float) -> Judgement:
    from kserve_adapter.canary.prometheus import Prometheus

    settings = JudgeSettings(**{field.name: getattr(arguments, field.name) for field in fields(JudgeSettings)})
    selectors = (
        f'baton_name="{arguments.name}",baton_revision="{revision}"'
        for revision in (arguments.stable, arguments.canary)
    )
    with closing(Prometheus(arguments.prometheus)) as server:
        stable, canary = (server.evidence(selector, minutes * 60, arguments.step_s) for selector in selectors)
    return judge(stable, canary, minutes, settings)


def _tell(judgement: Judgement) -> None:
    """One line of JSON: for people and pipelines alike."""
    print(json.dumps({"verdict": judgement.verdict.value, "reasons": list(judgement.reasons)}), flush=True)
