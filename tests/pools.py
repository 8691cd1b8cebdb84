"""What tests ask of the workers behind a running server, over Ray Serve handles like a front end."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import ray
from ray import serve

ROLES = ("prefill", "decode")


class Pools:
    """One worker of each role, on the Ray cluster of this machine."""

    def __init__(self, application: str = "baton") -> None:
        ray.init(address="auto", log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
        self._handles = {role: serve.get_deployment_handle(role, application) for role in ROLES}

    def call(self, role: str, method: str, *args: Any) -> Any:
        """Call a method of the engine core of a role's first worker."""
        return self._handles[role].call.remote(None, method, list(args)).result(timeout_s=60)

    def state(self, role: str) -> Counter[str]:
        """The counts of a worker's engine."""
        return Counter(self.call(role, "state"))

    def held(self) -> list[str]:
        """Roles whose engine holds any KV block: vLLM refuses to reset its prefix cache then."""
        return [role for role in ROLES if not self.call(role, "reset_prefix_cache")]

    def wait_until_free(self, timeout_s: float) -> list[str]:
        """Roles that still hold blocks after `timeout_s`; empty as soon as none does."""
        deadline = time.monotonic() + timeout_s
        while (held := self.held()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return held

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()
