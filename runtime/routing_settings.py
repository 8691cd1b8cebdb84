"""The settings of placement: which of the presets, and what is set over it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from kv_transfer.settings import Settings
from runtime.policy.types import PRESETS, RoutingSettings


class RoutingSection(Settings):
    """Where requests run."""

    preset: Literal["latency", "throughput", "always-disaggregated", "never", "round-robin", "least-loaded"] = Field(
        "latency",
        description="`latency`: the least time to first token with short gaps between tokens. `throughput`: longer "
        "gaps, so that busy pools help each other sooner. `always-disaggregated`: whatever can be. `never`: each "
        "request whole on one worker. To compare with: `round-robin` and `least-loaded` (by requests), which "
        "disaggregate all that can be.",
    )
    itl_limit_s: float | None = Field(
        None, gt=0, description="Longest usual time between two tokens of a stream, in place of the preset's."
    )
    gap_limit_s: float | None = Field(
        None,
        gt=0,
        description="Longest single gap between two tokens when a prompt is read beside the stream, in place of the "
        "preset's.",
    )
    borrow: bool | None = Field(
        None, description="Whether an idle worker of one pool does the other's work, in place of the preset's choice."
    )
    behind_s: float | None = Field(
        None,
        ge=0,
        description="A prefill pool whose best worker has this much to read is behind, in place of the preset's.",
    )

    cache_aware: bool = Field(
        True, description="Whether workers publish which KV blocks they hold, and requests follow their blocks."
    )
    index_blocks: int = Field(
        2_000_000,
        ge=1000,
        description="Most pairs of block and worker that a front end remembers: 150 to 200 bytes each.",
    )

    def policy(self) -> RoutingSettings:
        """The preset with what is set over it."""
        names = ("itl_limit_s", "gap_limit_s", "borrow", "behind_s")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(PRESETS[self.preset], **own)
