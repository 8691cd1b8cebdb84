"""Service level objectives: what a client may expect of a stream."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits that nearly all requests are to keep (`percentile` of them).

    Attributes:
        ttft_s: longest time to first token, in seconds.
        itl_s: longest mean time between the tokens of a stream, in seconds.
    """

    ttft_s: float = 2.0
    itl_s: float = 0.1
    percentile: float = 0.99


DEFAULT = Objectives()

PRESETS: dict[str, Objectives] = {
    "8b-server": Objectives(2.0, 0.1),
    "8b-interactive": Objectives(0.5, 0.03),
    "70b-server": Objectives(2.0, 0.2),
    "70b-interactive": Objectives(0.45, 0.04),
    "405b-server": Objectives(6.0, 0.175),
    "405b-interactive": Objectives(4.5, 0.08),
    "deepseek-r1-server": Objectives(2.0, 0.08),
    "deepseek-r1-interactive": Objectives(1.5, 0.015),
    "gpt-oss-120b-server": Objectives(3.0, 0.08),
    "gpt-oss-120b-interactive": Objectives(2.0, 0.015),
}
"""The limits of MLPerf inference's LLM benchmarks by model size (p99 of TTFT and of the time per output token)."""
