"""`baton serve`: start Ray if there is none, deploy, say what happens, wait for Ctrl-C, drain, leave nothing behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from types import FrameType

from runtime.config import ROLES, Config
from runtime.http_server import listen

POLL_S = 1.0
TELL_EVERY_S = 15.0


def serve_until_stopped(config: Config, address: str | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status (0, or 1 when the application did not come up).

    Raises:
        ConfigError: the address to listen on is taken.
    """
    if address is None:
        listen(config.front_end.host, config.front_end.port).close()  # now, and not after the engines have started
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    started = time.monotonic()
    _say(started, f"joining the Ray cluster at {address}" if address else "starting Ray")
    start_ray(address)
    _start_serve(config, own_server=address is None)
    try:
        _say(started, f"starting {config.model_name} on {config.prefill.replicas} prefill and "
             f"{config.decode.replicas} decode workers ({config.engine} engines)")  # fmt: skip
        if not _deploy(config, started, stop, own_server=address is None):
            return 0 if stop.is_set() else 1
        _say(started, _ready_line(config))
        stop.wait()
        return 0
    finally:
        stop.set()
        _say(started, f"stopping: requests have {config.limits.drain_s:g} s to finish; Ctrl-C again stops at once")
        _stop(config, hurry, owned=address is None)
        _say(started, "stopped")


LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Ray listens on the machine's address, whatever address it is given, unless it believes that there can be no other
machine (`ray._private.services.get_node_ip_address`). Whoever joins such a cluster needs the variable, too."""


def start_ray(address: str | None) -> None:
    """Join the Ray cluster at `address`, or start one on this machine alone."""
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if address is None:
        os.environ.setdefault(*LOOPBACK)
    for name in ("ray", "ray.serve"):  # what they say here means nothing to a user; faults are told by `_deploy`
        logging.getLogger(name).setLevel(logging.ERROR)
    import ray

    if address is None:
        # "local": without an address Ray would look for a cluster of this machine, and wait for one that is long gone.
        here = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(**here, log_to_driver=False, configure_logging=False)
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)


def _start_serve(config: Config, *, own_server: bool) -> None:
    from ray import serve
    from ray.serve.config import ProxyLocation

    if own_server:
        serve.start(proxy_location=ProxyLocation.Disabled)  # front ends listen themselves
    else:
        serve.start(http_options={"host": config.front_end.host, "port": config.front_end.port})


def _deploy(config: Config, started: float, stop: threading.Event, *, own_server: bool) -> bool:
    """Deploy and follow the start until it is ready, has failed or is stopped; tells each change."""
    from ray import serve

    from runtime.app import application

    target = serve.RunTarget(application(config, own_server=own_server), name=config.name, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    told: dict[str, str] = {}
    last = time.monotonic()
    while not stop.wait(POLL_S):
        app = serve.status().applications.get(config.name)
        if app is None:
            continue
        for name, deployment in app.deployments.items():
            state = deployment.status.value
            if told.get(name) != state:
                told[name] = state
                last = time.monotonic()
                _say(started, f"{name}: {_in_words(state)}")
        if app.status.value == "RUNNING":
            return True
        if "warming" not in told and all(told.get(role) == "HEALTHY" for role in ROLES):
            told["warming"] = ""
            _say(started, "warming: a request through every path that compiles or connects on first use")
        if (
            app.status.value in ("DEPLOY_FAILED", "UNHEALTHY")
            or time.monotonic() - started > config.limits.start_timeout_s
        ):
            _say(started, f"the start failed: {app.message}")
            return False
        if time.monotonic() - last > TELL_EVERY_S:
            last = time.monotonic()
            waiting = ", ".join(sorted(name for name, state in told.items() if state not in ("HEALTHY", "")))
            _say(started, f"still starting: {waiting}")
    return False


def _in_words(state: str) -> str:
    return {"UPDATING": "starting", "HEALTHY": "ready", "UNHEALTHY": "unhealthy"}.get(state, state.lower())


def _ready_line(config: Config) -> str:
    url = f"http://{config.front_end.host}:{config.front_end.port}/v1"
    question = "What is the capital of France?"
    body = json.dumps({"model": config.model_name, "messages": [{"role": "user", "content": question}]})
    return f"ready: curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _say(started: float, what: str) -> None:
    print(f"[baton {time.monotonic() - started:5.1f} s] {what}", flush=True)


def _stop(config: Config, hurry: threading.Event, *, owned: bool) -> None:
    """Let front ends and workers finish what they have, within bounds; then end what is ours."""
    import ray
    from ray import serve

    serve.delete(config.name, _blocking=False)
    deadline = time.monotonic() + config.limits.grace.serve_s
    while config.name in serve.status().applications and time.monotonic() < deadline:
        if hurry.wait(POLL_S / 4):
            break
    else:
        if owned:
            serve.shutdown()
    ray.shutdown()
