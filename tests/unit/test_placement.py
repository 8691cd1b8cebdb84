"""Where Ray puts workers: written for GPUs and several machines, tested as configuration."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.app import build, placement
from runtime.config_file import parse
from runtime.errors import ConfigError

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cpu", {}, {"ray_actor_options": {"num_cpus": 0.1}}),
    ("one gpu", {"prefill": {"num_gpus": 1}}, {"ray_actor_options": {"num_cpus": 0.1, "num_gpus": 1}}),
    (
        "tensor parallel, own node pool",
        {
            "engine_args": {"tensor_parallel_size": 4},
            "prefill": {"num_gpus": 4, "label_selector": {"pool": "prefill"}, "resources": {"rdma": 1}},
        },
        {
            "ray_actor_options": {
                "num_cpus": 0.1,
                "num_gpus": 4,
                "label_selector": {"pool": "prefill"},
                "resources": {"rdma": 1},
            }
        },
    ),
    (
        "over two machines",
        {"engine_args": {"pipeline_parallel_size": 2}, "prefill": {"num_gpus": 2, "nodes": 2, "num_cpus": 2}},
        {
            "ray_actor_options": {"num_cpus": 2.0},
            "placement_group_bundles": [{"CPU": 2.0}, {"GPU": 1.0}, {"GPU": 1.0}],
            "placement_group_strategy": "PACK",
        },
    ),
]


@pytest.mark.parametrize(("data", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_placement(data: dict[str, Any], expected: dict[str, Any]) -> None:
    """The deployment options for each kind of worker."""
    assert placement(parse({"model": "/m", **data}), "prefill") == expected


@pytest.mark.parametrize(("nodes", "gpus", "backend"), [(1, 0, "mp"), (1, 2, "mp"), (2, 2, "ray"), (1, 1, None)])
def test_executor(nodes: int, gpus: int, backend: str | None) -> None:
    """One machine: vLLM's own processes; several: its Ray executor; one GPU: vLLM's choice."""
    pool = {"num_gpus": gpus, "nodes": nodes}
    config = parse(
        {"model": "/m", "engine_args": {"tensor_parallel_size": max(gpus, 1)}, "prefill": pool, "decode": pool}
    )
    assert config.engine_settings("prefill").args.get("distributed_executor_backend") == backend


@pytest.mark.parametrize("args", [{}, {"confg": "x"}, {"config": "x", "more": "y"}])
def test_build_wants_one_argument(args: dict[str, str]) -> None:
    """A typo on the command line is told, not ignored."""
    with pytest.raises(ConfigError, match="config=FILE"):
        build(args)
