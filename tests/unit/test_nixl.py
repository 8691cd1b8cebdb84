"""NIXL's settings for each engine, and pairs that could not exchange KV."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kv_transfer import nixl
from kv_transfer.engine import EngineFacts
from kv_transfer.nixl import IncompatibleEngines, check_compatible, free_port, transfer_config, transport_env
from kv_transfer.settings import EngineSettings, TransportSettings

FACTS = EngineFacts("e", "prefill", "/m", "bfloat16", "auto", 16, 1, 8192, 100, "127.0.0.1", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "/other"), ("dtype", "float16"), ("cache_dtype", "fp8"), ("block_tokens", 32), ("tensor_parallel", 2)],
)
def test_a_pair_that_could_not_exchange_kv_is_refused(name: str, value: Any) -> None:
    """The reason names the fact and both values."""
    with pytest.raises(IncompatibleEngines) as error:
        check_compatible(FACTS, replace(FACTS, role="decode", **{name: value}))
    assert name in str(error.value) and repr(value) in str(error.value)


def test_a_pair_may_differ_in_what_does_not_matter() -> None:
    """Size of the cache, window and address are each engine's own."""
    check_compatible(FACTS, replace(FACTS, role="decode", num_blocks=7, kv_port=2, max_model_len=4096))


def test_every_incarnation_has_a_fresh_engine_id() -> None:
    """An engine that comes back on the same address must not be taken for the one before."""
    settings = EngineSettings(role="prefill", model="/m")
    assert transfer_config(settings)["engine_id"] != transfer_config(settings)["engine_id"]


def test_roles_lease_and_failure_policy() -> None:
    """Prefill produces, decode consumes; a failed pull comes back to Baton."""
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        settings = EngineSettings(role=role, model="/m", transport=TransportSettings(lease_s=77))  # type: ignore[arg-type]
        config = transfer_config(settings)
        assert config["kv_role"] == kv_role
        assert config["kv_load_failure_policy"] == "fail"
        assert config["kv_connector_extra_config"] == {"kv_lease_duration": 77}


def test_transport_environment() -> None:
    """Side channel address and UCX transports come from the settings."""
    env = transport_env(TransportSettings(ucx_tls="rc,cuda_copy", ucx_net_devices="mlx5_0:1"), "10.0.0.7", 4711)
    assert env == {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.7",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "4711",
        "UCX_TLS": "rc,cuda_copy",
        "UCX_NET_DEVICES": "mlx5_0:1",
    }


@pytest.mark.parametrize(("host", "devices"), [("127.0.0.1", "lo"), ("::1", "lo"), ("10.0.0.7", None), ("node7", None)])
def test_ucx_stays_on_loopback_with_its_host(host: str, devices: str | None) -> None:
    """An engine on a loopback address listens on no other interface."""
    assert transport_env(TransportSettings(), host, 1).get("UCX_NET_DEVICES") == devices


def test_a_free_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port in use would hang vLLM's start for ever."""
    with socket.socket() as taken:
        port = free_port("127.0.0.1")
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(nixl, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match="no free port"):
            free_port("127.0.0.1")


def test_nobody_is_given_a_side_channels_port() -> None:
    """vLLM binds it much later: by then it would be a connection's, were it one of those that the kernel gives away."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_port("127.0.0.1") < first
