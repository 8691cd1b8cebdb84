"""NIXL as vLLM's connector uses it: roles, ports, transports, and which engines can exchange KV at all."""

from __future__ import annotations

import ipaddress
import random
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kv_transfer.engine import EngineFacts
from kv_transfer.settings import EngineSettings, TransportSettings

# kv_both would let one engine do either, but vLLM 0.32 deprecates it; a kv_consumer also runs whole requests.
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}

COMPATIBLE = ("model", "dtype", "cache_dtype", "block_tokens", "tensor_parallel")
"""Facts that must agree between a prefill and a decode engine. vLLM checks a hash of the same at the handshake, but
only when the first request arrives; Baton refuses at start, with the reason."""


class IncompatibleEngines(ValueError):
    """A prefill and a decode engine that could not exchange KV."""


def transfer_config(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's `KVTransferConfig` fields for one incarnation of an engine; the engine id is fresh each time."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": ROLES[settings.role],
        "engine_id": uuid.uuid4().hex,
        # A failed pull comes back as finish_reason "error", so that Baton can plan again; "recompute" would stall the
        # other streams of the decode engine with a long prompt.
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": settings.transport.lease_s},
    }


def transport_env(transport: TransportSettings, host: str, port: int) -> dict[str, str]:
    """Environment that puts the side channel on `host:port` and chooses UCX's transports."""
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
        "UCX_TLS": transport.ucx_tls,
    }
    if devices := transport.ucx_net_devices or ("lo" if _is_loopback(host) else None):
        env["UCX_NET_DEVICES"] = devices
    return env


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


PORTS = range(20_000, 30_000)
"""Of side channels: above those that Ray gives its workers, below Kubernetes' node ports and the ephemeral ones."""


def free_port(host: str) -> int:
    """A TCP port on `host` that was free a moment ago, for vLLM's side channel.

    A port in use hangs vLLM's start for ever, and vLLM binds it tens of seconds from now. Any connection of this
    machine may have been given an ephemeral port by then, so it is none of these.

    Raises:
        OSError: when this host has no such port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket(family) as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1} on {host}")


def check_compatible(prefill: EngineFacts, decode: EngineFacts) -> None:
    """Refuse a pair that could not exchange KV.

    Raises:
        IncompatibleEngines: naming each fact that differs, with both values.
    """
    check_agree(
        [(name, getattr(prefill, name), getattr(decode, name)) for name in COMPATIBLE],
    )


def check_agree(facts: Sequence[tuple[str, object, object]]) -> None:
    """Raise `IncompatibleEngines` for each `(name, prefill value, decode value)` that differs."""
    differing = [
        f"{name} is {ours!r} on prefill and {theirs!r} on decode" for name, ours, theirs in facts if ours != theirs
    ]
    if differing:
        raise IncompatibleEngines(
            "prefill and decode could not exchange KV blocks: "
            + "; ".join(differing)
            + ". Give both pools the same value."
        )
