"""The engine core as the rest of Baton sees it: requests in, one batch of outputs per step out.

Two things stand behind this interface: `kv_transfer.vllm_engine` (a real vLLM engine core in its own process) and
`kv_transfer.simulator` (real roles, no model). Both speak vLLM's records `EngineCoreRequest` and `EngineCoreOutputs`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

    from kv_transfer.settings import EngineSettings


class EngineError(Exception):
    """Base of what an engine can raise."""


class EngineDied(EngineError):
    """The engine core is gone; its worker has to be replaced."""


class EngineStartFailed(EngineError):
    """The engine core did not come up; the message says what to change where that is known."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine really came up with. Crosses processes as a plain dict (`to_dict`)."""

    engine_id: str  # fresh for every incarnation
    role: str  # "prefill" or "decode"
    model: str
    dtype: str
    cache_dtype: str
    block_tokens: int
    tensor_parallel: int
    max_model_len: int
    num_blocks: int
    kv_host: str
    kv_port: int
    metrics_port: int = 0  # of the worker's `/metrics`, on the same host; 0: none
    max_streams: int | None = None  # most requests in one step
    max_step_tokens: int | None = None  # most tokens in one step
    events: str = ""  # ZMQ endpoint of its KV events; none are published without
    events_replay: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a dict of strings and ints, for Ray Serve's replica metadata."""
        return asdict(self)


class Engine(Protocol):
    """One engine core. All methods are called from one event loop."""

    facts: EngineFacts

    async def add(self, request: EngineCoreRequest) -> None:
        """Queue `request`. It must have passed vLLM's input checks: a prompt over the window kills a real engine."""

    async def abort(self, request_ids: list[str]) -> None:
        """Stop these requests and free their blocks; unknown ids are ignored. No output follows."""

    async def outputs(self) -> EngineCoreOutputs:
        """The outputs of the next step, for all requests that got a token or ended.

        Raises:
            EngineDied: the core is gone.
        """

    async def call(self, method: str, *args: Any) -> Any:
        """Call one of the core's utility methods (`reset_prefix_cache`, `add_lora`, …)."""

    def vllm_config(self) -> Any:
        """The `VllmConfig` that a front end needs, with the window and block size that the engine came up with."""

    def shutdown(self) -> None:
        """Stop the core and all of its processes. Safe to call twice."""


async def start_engine(settings: EngineSettings) -> Engine:
    """Start the engine that `settings.kind` names and wait until it can take requests.

    Raises:
        EngineStartFailed: with the reason.
    """
    if settings.kind == "simulated":
        from kv_transfer.simulator import SimulatedEngine

        return await SimulatedEngine.start(settings)
    from kv_transfer.vllm_engine import VllmEngine

    return await VllmEngine.start(settings)
