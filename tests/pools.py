"""What tests ask of the workers behind a running server, over Ray Serve handles like a front end."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, Protocol

import ray
from ray import serve

from runtime.config_file import parse
from runtime.engine_board import subscribe
from tests.conftest import wait_for

ROLES = ("prefill", "decode")


class OnRay(Protocol):
    """A server with a Ray cluster."""

    def ray_address(self) -> str:
        """Of its cluster."""


class Pools:
    """The workers of both roles, on the Ray cluster of a server, or on the only one of this machine."""

    def __init__(self, server: OnRay | None = None, application: str = "baton") -> None:
        self._token = parse({"name": application}).token()  # of the demo model, which all suites serve
        address = server.ray_address() if server else "auto"
        ray.init(address=address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
        self._handles = {role: serve.get_deployment_handle(role, application) for role in ROLES}
        self._engines: dict[str, list[str]] = {}
        for role, handle in self._handles.items():
            # Starts Serve's router, which tells who is there.
            handle.call.remote(None, self._token, "state", []).result(timeout_s=60)
            subscribe(application, role, lambda facts, role=role: self._update(role, facts))

    def _update(self, role: str, facts: list[dict[str, Any]]) -> None:
        self._engines[role] = [fact["engine_id"] for fact in facts]

    def engines(self, role: str) -> list[str]:
        """The engine ids of a role's workers, as Ray Serve announces them."""
        return list(self._engines.get(role, ()))

    def call(self, role: str, engine_id: str, method: str, *args: Any) -> Any:
        """Call a method of one worker's engine core."""
        return self._handles[role].call.remote(engine_id, self._token, method, list(args)).result(timeout_s=60)

    def states(self, role: str) -> dict[str, Counter[str]]:
        """The counts of each worker's engine; those that have just died are left out."""
        told = {}
        for engine_id in self.engines(role):
            with suppress(Exception):
                told[engine_id] = Counter(self.call(role, engine_id, "state"))
        return told

    def state(self, role: str) -> Counter[str]:
        """The counts of all engines of a role together."""
        return sum(self.states(role).values(), Counter())

    def leases_expired(self) -> int:
        """Handoffs of the living engines that nobody settled."""
        return sum(self.state(role)["leases_expired"] for role in ROLES)

    def free(self, role: str) -> bool:
        """Whether no engine of a role holds any KV block: vLLM refuses to reset its prefix cache then."""
        return all(self.call(role, engine_id, "reset_prefix_cache") for engine_id in self.engines(role))

    def quiet(self) -> bool:
        """Whether no living simulated engine has a request, a block that is held, or a handoff."""
        left = self.state("prefill") + self.state("decode")
        return not any(left[name] for name in ("waiting", "running", "fetching", "blocks_held", "handoffs"))

    def held(self) -> list[str]:
        """Roles with an engine that holds any KV block."""
        return [role for role in ROLES if not self.free(role)]

    def wait_until_free(self, timeout_s: float) -> list[str]:
        """Roles that still hold blocks after `timeout_s`; empty as soon as none does."""
        left: list[str] = []

        def free() -> bool:
            left[:] = self.held()
            return not left

        wait_for(free, timeout_s)
        return left  # and not what is held a moment later: a worker that has just come may be warming

    def close(self) -> None:
        """Leave the cluster; handles' routers would go on asking a cluster that is gone."""
        for handle in self._handles.values():
            handle.shutdown()
        ray.shutdown()
