"""Settings of one engine, the KV transport and the simulator: the slice of the configuration that workers see.

All models are frozen and refuse unknown keys; `runtime.config` puts them together into one YAML file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every settings record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TransportSettings(Settings):
    """How KV blocks go from a prefill to a decode engine (vLLM's NixlConnector, pull mode)."""

    host: str = Field(
        "auto",
        description="Address that an engine's NIXL side channel binds to and announces. `auto` is the address of "
        "the Ray node; with both pools on one machine, `127.0.0.1` keeps strangers out.",
    )
    ucx_tls: str = Field(
        "self,sm,cma,tcp",
        description="UCX transports (`UCX_TLS`). Add `cuda_ipc` and `cuda_copy` on GPUs, `rc` for RDMA.",
    )
    ucx_net_devices: str | None = Field(
        None,
        description="Network devices for UCX (`UCX_NET_DEVICES`), such as `mlx5_0:1`. By default `lo` where the "
        "host is a loopback address, so that nothing else listens, and UCX's own choice elsewhere.",
    )
    lease_s: int = Field(
        60,
        ge=5,
        le=3600,
        description="How long a finished prefill keeps its KV blocks for a decode engine that shows no sign of life. "
        "The last resort: Baton releases what nobody will pull at once. Long CPU steps delay the heartbeats.",
    )


class SimulatorSettings(Settings):
    """Speed and size of a simulated engine (`engine: simulated`)."""

    prefill_tokens_per_s: float = Field(20_000.0, gt=0, description="Prompt tokens that an engine reads per second.")
    step_base_s: float = Field(0.005, ge=0, description="Time of a decode step with an empty batch, in seconds.")
    step_per_request_s: float = Field(
        0.0002, ge=0, description="Time that each request in the batch adds to a step, in seconds."
    )
    step_per_kv_token_s: float = Field(
        1e-8, ge=0, description="Time that each token of KV in the batch adds to a step, in seconds."
    )
    transfer_bytes_per_s: float = Field(10e9, gt=0, description="Bandwidth of a KV pull, in bytes per second.")
    kv_bytes_per_token: int = Field(
        23_040, ge=1, description="KV bytes of one token; the default is SmolLM2-135M in bf16."
    )
    block_tokens: int = Field(16, ge=1, description="Tokens in a KV block.")
    num_blocks: int = Field(8192, ge=2, description="KV blocks of an engine.")
    max_batch_requests: int = Field(256, ge=1, description="Requests that one step can hold.")
    max_step_tokens: int = Field(2048, ge=1, description="Prompt tokens that one step can read (chunked prefill).")
    zero_time: bool = Field(False, description="Take no time for anything: for measuring what Baton itself costs.")


class EngineSettings(Settings):
    """What one engine core runs: resolved from the common settings and those of its pool."""

    role: Literal["prefill", "decode"] = Field(description="Which half of a request this engine serves.")
    kind: Literal["vllm", "simulated"] = Field("vllm", description="A real vLLM engine core, or the simulator.")
    model: str = Field(description="Directory of the model in Hugging Face layout.")
    args: dict[str, Any] = Field(default_factory=dict, description="vLLM engine arguments (`AsyncEngineArgs` fields).")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the engine's processes.")
    pinned_threads: int = Field(0, ge=0, description="Threads of each CPU model worker that get cores of their own.")
    token: str = Field("", description="What a call has to carry to be one of this worker's own application.")
    hang_s: float = Field(300.0, gt=0, description="Seconds without a step after which an engine with work is dead.")
    start_timeout_s: float = Field(1800.0, gt=0, description="Seconds after which a start is given up.")
    pull_timeout_s: float = Field(60.0, gt=0, description="Seconds after which a pull in progress is given up.")
    events: bool = Field(True, description="Whether the engine publishes its KV events.")
    transport: TransportSettings = Field(default_factory=TransportSettings)  # type: ignore[arg-type]
    simulator: SimulatorSettings = Field(default_factory=SimulatorSettings)  # type: ignore[arg-type]
