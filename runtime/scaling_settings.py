"""Settings of the objectives and of scaling: slices of the one settings file."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Literal

from pydantic import Field, model_validator

from kv_transfer.settings import Settings
from runtime.policy.demand import DemandSettings
from runtime.policy.objectives import PRESETS, Objectives
from runtime.policy.scaling_records import PoolBounds, ScalingSettings

SIMPLE_MOST = 10
"""Most workers of a pool under the simple rule, unless the settings say so."""


class ObjectiveSection(Settings):
    """What clients may expect: the limits that nearly all requests are to keep."""

    preset: Literal[
        "8b-server",
        "8b-interactive",
        "70b-server",
        "70b-interactive",
        "405b-server",
        "405b-interactive",
        "deepseek-r1-server",
        "deepseek-r1-interactive",
        "gpt-oss-120b-server",
        "gpt-oss-120b-interactive",
    ] = Field("8b-server", description="The limits of MLPerf inference for a model of this size.")
    ttft_s: float | None = Field(
        None, gt=0, description="Longest time to first token in place of the preset's, in seconds."
    )
    itl_s: float | None = Field(
        None, gt=0, description="Longest mean time between the tokens of a stream in place of the preset's, in seconds."
    )
    percentile: float = Field(0.99, gt=0, lt=1, description="The part of all requests that is to keep the limits.")

    def policy(self) -> Objectives:
        """The preset with what is set over it."""
        chosen = replace(PRESETS[self.preset], percentile=self.percentile)
        return replace(chosen, ttft_s=self.ttft_s or chosen.ttft_s, itl_s=self.itl_s or chosen.itl_s)


class PoolScaling(Settings):
    """How small and how large a pool may get. It starts with the pool's `replicas`."""

    min: int | None = Field(
        None, ge=0, le=1000, description="Fewest workers; by default the pool's `replicas`. 0 lets the pool sleep."
    )
    max: int | None = Field(None, ge=1, le=1000, description="Most workers; by default the pool's `replicas`.")


class ScalingSection(Settings):
    """How the pools scale. Off unless a pool's `max` is above its `min`."""

    prefill: PoolScaling = Field(default_factory=PoolScaling, description="Bounds of the prefill pool.")  # type: ignore[arg-type]
    decode: PoolScaling = Field(default_factory=PoolScaling, description="Bounds of the decode pool.")  # type: ignore[arg-type]
    rule: Literal["work", "queue_depth"] = Field(
        "work",
        description="`work`: seconds of work, latencies against the objectives, KV in use. `queue_depth`: the simple "
        "rule, waiting requests for each worker, between 1 and 10 workers unless the bounds say so.",
    )
    queue_depth: float = Field(
        5.0, gt=0, description="Waiting requests for each worker beyond which a pool grows, under the simple rule."
    )
    clear_s: float = Field(10.0, gt=0, description="Queued prompts are to be read within this time, in seconds.")
    budget_gpus: int | None = Field(
        None, ge=1, description="GPUs that both pools may have together; by default what the bounds allow."
    )
    ratio_min: float | None = Field(None, ge=0, description="Fewest prefill workers for each decode worker.")
    ratio_max: float | None = Field(None, gt=0, description="Most prefill workers for each decode worker.")
    borrow_s: float = Field(
        5.0, ge=0, description="How long a pool with room helps the other one before that one grows, in seconds."
    )
    shrink_after_s: float = Field(
        120.0, ge=0, description="How long a pool has to be too large before it shrinks by a quarter, in seconds."
    )
    idle_s: float = Field(
        300.0, ge=0, description="After so long without any work pools go to their `min` at once, in seconds."
    )

    @model_validator(mode="after")
    def _check(self) -> ScalingSection:
        if (self.ratio_min or 0.0) > (inf if self.ratio_max is None else self.ratio_max):
            raise ValueError("ratio_min is above ratio_max")
        return self

    def bounds(self, pool: Literal["prefill", "decode"], replicas: int, gpus: int) -> PoolBounds:
        """The bounds of a pool that starts with so many workers, which have so many GPUs each.

        Raises:
            ValueError: they don't hold the number that the pool starts with.
        """
        section = self.prefill if pool == "prefill" else self.decode
        simple = self.rule == "queue_depth"
        least = section.min if section.min is not None else (1 if simple else replicas)
        most = section.max if section.max is not None else (max(SIMPLE_MOST, replicas) if simple else replicas)
        if not least <= replicas <= most:
            raise ValueError(
                f"{pool}.replicas is {replicas}, but scaling.{pool} is {least} to {most}: a pool starts within bounds"
            )
        return PoolBounds(least, most, gpus)

    def policy(self, prefill: PoolBounds, decode: PoolBounds, objectives: Objectives) -> ScalingSettings | None:
        """What the policy goes by; None when there is nothing to scale.

        Raises:
            ValueError: the budget does not pay for the least that there has to be.
        """
        if prefill.most == prefill.least and decode.most == decode.least:
            return None
        least = max(1, prefill.least) * prefill.gpus + max(1, decode.least) * decode.gpus
        if self.budget_gpus is not None and self.budget_gpus < least:
            raise ValueError(f"scaling.budget_gpus is {self.budget_gpus}, but the smallest pools need {least} GPUs")
        ratio = None
        if self.ratio_min is not None or self.ratio_max is not None:
            ratio = (self.ratio_min or 0.0, inf if self.ratio_max is None else self.ratio_max)
        return ScalingSettings(
            prefill,
            decode,
            DemandSettings(self.rule, self.queue_depth, self.clear_s, objectives),
            budget_gpus=self.budget_gpus,
            ratio=ratio,
            borrow_s=self.borrow_s,
            shrink_after_s=self.shrink_after_s,
            idle_s=self.idle_s,
        )
