"""The pools' ratio follows the traffic."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.elastic import LONG_ANSWERS, LONG_PROMPTS, Phase, Run, run
from tests.conftest import Server
from tests.elastic.conftest import GROWS_WITHIN_S, SHRINKS_WITHIN_S


@pytest.mark.timeout(1500)
def test_the_ratio_follows_the_traffic(elastic: Server) -> None:
    """Long prompts ask for prefill workers alone, long answers for decode workers alone; nothing is lost between."""

    def wanted(so_far: Run, pool: str) -> bool:
        """Several workers of this pool, and the least of the other one."""
        last, other = so_far.samples[-1] if so_far.samples else {}, "decode" if pool == "prefill" else "prefill"
        return bool(last) and last[pool]["desired"] >= 2 and last[other]["desired"] == 1

    def prefill_heavy(so_far: Run) -> bool:
        return wanted(so_far, "prefill")

    def decode_heavy(so_far: Run) -> bool:
        return wanted(so_far, "decode")

    seen = asyncio.run(
        run(
            elastic.url,
            [
                Phase(GROWS_WITHIN_S, 1.5, prefill_heavy, *LONG_PROMPTS),
                Phase(2 * SHRINKS_WITHIN_S, 0.5, decode_heavy, *LONG_ANSWERS),
            ],
        )
    )
    assert not seen.failed
    long_prompts = [sample for sample in seen.samples if sample["read_s"] > sample["written_s"]]
    assert any(wanted(Run([sample]), "prefill") for sample in long_prompts)
    assert not any(wanted(Run([sample]), "decode") for sample in long_prompts)
    assert any(wanted(Run([sample]), "decode") for sample in seen.samples[len(long_prompts) :])
