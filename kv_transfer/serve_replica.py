"""What Baton changes in a Ray Serve replica of its own.

Serve gives each replica a gRPC server for calls from other replicas. It listens on all interfaces and unpickles what it
is sent, without asking who sends. Baton's calls travel as calls of actors, over Ray's own connections, and need it only
where `RAY_SERVE_USE_GRPC_BY_DEFAULT` says so: elsewhere it is bound to loopback, out of the network's reach.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve._private import replica
from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

GRPC_ADDRESS = "127.0.0.1:0"

_add_port = replica.add_port_to_grpc_server


def prepare_replica() -> None:
    """To be called by every deployment of Baton's before its `__init__` returns, when Serve opens the server."""
    for name in ("baton", "vllm"):  # Baton's log, and vLLM's of this process, go where Serve sends a replica's
        logger = logging.getLogger(name)
        logger.parent = logging.getLogger("ray.serve")
        logger.setLevel(logging.INFO)
    if not RAY_SERVE_USE_GRPC_BY_DEFAULT:
        replica.add_port_to_grpc_server = _on_loopback


def _on_loopback(server: Any, address: str) -> int:
    return int(_add_port(server, GRPC_ADDRESS))
