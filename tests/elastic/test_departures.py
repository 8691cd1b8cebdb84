"""Who leaves, on real Ray: not the worker that Serve would take, when its KV is what requests go on finding."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, baton_serve, wait_for
from tests.pools import Pools

SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": 2},
    "routing": {"preset": "always-disaggregated"},
    "scaling": {"prefill": {"min": 1, "max": 2}, "shrink_after_s": 30},
}
PROMPT_TOKENS, HITS = 4000, 10


@pytest.mark.timeout(900)
def test_the_worker_whose_cache_is_used_stays(tmp_path: Path) -> None:
    """Serve lets the newest of two go; here its cache has spared what the other's has not."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        pools = Pools(server)
        assert wait_for(lambda: len(pools.engines("prefill")) == 2, 60)
        oldest, newest = pools.engines("prefill")  # in the order in which Serve has them

        def read() -> Counter[str]:
            return Counter(
                {engine: state["prompt_tokens_computed"] for engine, state in pools.states("prefill").items()}
            )

        def ask(prompt: list[int]) -> Counter[str]:
            """How many tokens of a prompt each worker read."""
            before = read()
            server.complete(prompt, max_tokens=1)
            return read() - before

        fresh = ([number, *range(PROMPT_TOKENS)] for number in count(20_000))
        found = next(prompt for prompt in fresh if ask(prompt)[newest] > PROMPT_TOKENS / 2)
        for _ in range(HITS):
            assert ask(found)[oldest] < PROMPT_TOKENS / 2
        assert wait_for(lambda: len(pools.engines("prefill")) == 1, 300)
        assert pools.engines("prefill") == [newest]
        pools.close()
