"""The engines of each deployment, as Ray Serve's routers of this process know them.

Routers live on Serve's own event loop and front ends on theirs; this is where news passes from one to the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Listener = Callable[[list[dict[str, Any]]], object]

_lock = threading.Lock()
_engines: dict[tuple[str, str], list[dict[str, Any]]] = {}
_listeners: dict[tuple[str, str], list[Listener]] = {}


def publish(application: str, deployment: str, engines: list[dict[str, Any]]) -> None:
    """Replace what is known of a deployment's engines (dicts of `EngineFacts`) and tell the listeners."""
    with _lock:
        _engines[application, deployment] = engines
        listeners = list(_listeners.get((application, deployment), ()))
    for listener in listeners:
        listener(engines)


def subscribe(application: str, deployment: str, listener: Listener) -> None:
    """Call `listener` with the facts of a deployment's engines, now and at each change, from any thread."""
    with _lock:
        _listeners.setdefault((application, deployment), []).append(listener)
        engines = _engines.get((application, deployment))
    if engines is not None:
        listener(engines)
