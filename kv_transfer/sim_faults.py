"""What goes wrong on purpose in a simulated engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kv_transfer.engine import EngineError


@dataclass
class Faults:
    """The faults of one engine: whether it is dead or hangs, how many pulls and legs are to fail, how slow it is."""

    dead: bool = False
    hang: bool = False
    fail_pulls: int = 0
    hang_pulls: int = 0
    fail_legs: int = 0
    slow: float = 1.0

    def inject(self, name: str, value: Any) -> None:
        """Set one of them.

        Raises:
            EngineError: there is no fault of this name.
        """
        if name not in self.__dataclass_fields__:
            raise EngineError(f"no fault {name}; there are {', '.join(self.__dataclass_fields__)}")
        setattr(self, name, value)
