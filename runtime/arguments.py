"""Numbers on the command line: checked where they come in, so that a wrong one is told by its option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def number(
    kind: Callable[[str], Number], *, least: float = 0.0, over: float = -math.inf, under: float = math.inf
) -> Callable[[str], Number]:
    """A type for argparse: `least` or more, more than `over`, less than `under`; never infinite."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from error
        if not (value >= least and over < value < under):  # nor NaN
            limits = f"more than {over:g}" if over >= least else f"at least {least:g}"
            limits += f" and less than {under:g}" if under < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    return read
