"""The front end's own HTTP server, where it stands alone on its machine: nothing between a client and the front end.

Ray Serve's proxy costs a stream's first byte about 10 ms and every chunk a message between processes. On a cluster it
is worth that, since it finds the front ends wherever they are; on one machine there is nothing to find.
"""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import ASGIApp

from runtime.errors import ConfigError

logger = logging.getLogger("baton.http")

BACKLOG = 2048
KEEP_ALIVE_S = 65
"""Idle connections are kept this long: longer than the minute after which common load balancers drop theirs."""


class HttpServer:
    """Serves an ASGI app on one address, from the running event loop.

    Args:
        shared: let several processes listen on the address; the kernel spreads connections over them.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, shared: bool = False) -> None:
        self._socket = listen(host, port, shared=shared)
        # Ray Serve runs the app's lifespan, and the log is the replica's.
        self._config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_S
        )
        self._server = uvicorn.Server(self._config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Take no more connections, let the open requests finish for at most `grace_s`, then cut them."""
        self._config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task
        self._socket.close()


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address can't be had; says what to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"can't listen on {host}:{port}: {error.strerror}. Give another front_end.port or front_end.host "
            "(--port, --host)"
        ) from error
    found.setblocking(False)
    return found
