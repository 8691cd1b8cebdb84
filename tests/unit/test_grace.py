"""One setting, and nobody is cut off by somebody else's shorter patience."""

from __future__ import annotations

import pytest
from ray._private import ray_constants

from kserve_adapter.__main__ import arguments, grace_s
from kserve_adapter.ray_node import STOP_S
from kserve_adapter.revision import GOODBYE_S
from runtime.app import application
from runtime.config import ROLES, Config
from runtime.config_file import parse
from runtime.grace import NODE_VARIABLE, POD_MARGIN_S


@pytest.mark.parametrize(("drain_s", "replace_s"), [(0, 0), (8, 30), (120, 120), (3600, 10)])
def test_each_budget_contains_the_one_before(drain_s: float, replace_s: float) -> None:
    """Moving comes before Serve's kill, that before the node's end, that before the pod's; Serve's stop of a replica
    on a node that goes leaves a replacement its time."""
    grace = parse({"limits": {"drain_s": drain_s, "wait_for_worker_s": replace_s}}).limits.grace
    assert grace.move_s == drain_s
    assert grace.move_s < grace.serve_s < grace.node_s + 1e-9
    assert grace.node_s - grace.serve_s == replace_s
    assert grace.pod_s > grace.pre_stop_s + grace.node_s


def test_serve_gets_them(tmp_path: object) -> None:
    """All three deployments have Serve's budget, so that no replica is killed before its streams have moved."""
    config = Config.model_validate({"engine": "simulated", "model": str(tmp_path), "limits": {"drain_s": 33}})
    front_end = application(config)
    deployments = [front_end._bound_deployment]
    pools = [deployments[0].init_kwargs[role] for role in ROLES]
    deployments += [pool._bound_deployment for pool in pools]
    assert {d.name for d in deployments} == {"front-end", "prefill", "decode"}
    assert {d._deployment_config.graceful_shutdown_timeout_s for d in deployments} == {config.limits.grace.serve_s}


@pytest.mark.parametrize(("argv", "expected"), [([], 31), (["--grace_period", "5"], 5), (["--grace_period", "0"], 0)])
def test_kserve_gets_them(argv: list[str], expected: int) -> None:
    """A predictor's streams have Serve's budget from its settings, unless an argument says otherwise."""
    assert grace_s(arguments(argv), parse({"limits": {"drain_s": 20.5}})) == expected


def test_a_predictor_leaves_in_time() -> None:
    """The goodbye to the keeper and to the Ray cluster fit into what a pod has for its end."""
    assert GOODBYE_S + STOP_S <= POD_MARGIN_S


def test_ray_reads_its_own() -> None:
    """`ray start --block` still has how long it drains its node from the variable that manifests set."""
    assert hasattr(ray_constants, NODE_VARIABLE)
