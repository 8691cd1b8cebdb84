"""The settings: one YAML file, frozen records, checked once at the edge. Each part of Baton gets only its slice."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kv_transfer.cores import BIND_ENV
from kv_transfer.engine_process import SPIN_ENV
from kv_transfer.nixl import IncompatibleEngines, check_agree
from kv_transfer.settings import EngineSettings, Settings, SimulatorSettings, TransportSettings
from runtime.admission_settings import AdmissionSettings
from runtime.errors import ConfigError
from runtime.limit_settings import LimitSettings
from runtime.policy.scaling_records import PoolBounds, ScalingSettings
from runtime.routing_settings import RoutingSection
from runtime.scaling_settings import ObjectiveSection, ScalingSection

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, Role] = ("prefill", "decode")

DEMO_MODEL = "demo"

MUST_AGREE = (
    "dtype",
    "quantization",
    "block_size",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "revision",
    "max_model_len",
)
"""Engine arguments on which both pools must agree: KV blocks of the one would be noise to the other."""

SHARE_TO_PIN = 4
"""Cores of an engine from which on its threads are pinned: with fewer, its own other processes would lack one."""

RESERVED = ("model", "kv_transfer_config", "kv_events_config", "served_model_name")
"""Engine arguments that Baton sets itself."""


class PoolSettings(Settings):
    """One pool of workers."""

    replicas: int = Field(1, ge=1, le=1000, description="Workers in this pool.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine arguments of this pool, over the common ones."
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of this pool's engines, over the common one."
    )
    num_gpus: int = Field(
        0,
        ge=0,
        description="GPUs of a worker; 0 is a CPU worker. Must be tensor_parallel_size x pipeline_parallel_size.",
    )
    num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray reserves for a worker's own process.")
    nodes: int = Field(
        1, ge=1, description="Machines that one worker spans (pipeline or tensor parallel over Ray's executor)."
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that a worker needs, such as `prefill_gpu: 1`."
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that a worker's node must have, such as `pool: decode`."
    )
    threads: int | Literal["auto"] = Field(
        "auto",
        description="OpenMP threads of a CPU engine; `auto` shares the machine's cores evenly among all engines; of "
        "a share of four or more, one is left to the engine's other processes, and the threads are pinned to cores of "
        "their own.",
    )


class FrontEndSettings(Settings):
    """The OpenAI-compatible HTTP server."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; loopback unless told otherwise.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    replicas: int = Field(1, ge=1, description="Front-end processes.")
    api_keys_file: str | None = Field(
        None,
        description="File with one API key a line. With keys, every request but health, metrics and version needs one.",
    )
    api_keys_env: str | None = Field(
        None, description="Name of an environment variable with API keys, separated by commas."
    )
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Largest request body, in bytes.")
    max_requests: int = Field(4096, ge=1, description="Requests that one front end has open at a time; more get a 429.")
    tool_call_parser: str | None = Field(None, description="vLLM's tool call parser for the model, such as `hermes`.")
    reasoning_parser: str | None = Field(
        None, description="vLLM's reasoning parser for the model, such as `deepseek_r1`."
    )
    chat_template: str | None = Field(None, description="A chat template (file) in place of the model's own.")
    otlp_traces_endpoint: str | None = Field(
        None,
        description="Where OpenTelemetry spans go, such as `http://localhost:4317`: vLLM's of each request, Baton's "
        "of its plan, in the client's trace (`traceparent`). OTLP over gRPC, unless the environment's "
        "`OTEL_EXPORTER_OTLP_TRACES_PROTOCOL` is `http/protobuf`.",
    )
    args: list[str] = Field(
        default_factory=list,
        description="Further command-line arguments of vLLM's OpenAI server, such as `--max-logprobs=50`.",
    )


class Config(Settings):
    """All settings of one Baton application."""

    model: str = Field(
        DEMO_MODEL,
        description="Directory of a model in Hugging Face layout, or its name on the Hugging Face Hub; "
        "`demo` is SmolLM2-135M-Instruct, prepared by `make setup`.",
    )
    revision: str | None = Field(None, description="Revision of the model on the Hub.")
    served_model_name: str | None = Field(
        None, description="The model id that clients use; by default the last part of `model`."
    )
    name: str = Field("baton", pattern=r"^[a-z0-9][a-z0-9-]*$", description="Name of the Ray Serve application.")
    secret_env: str | None = Field(
        None,
        description="Name of an environment variable with a secret by which workers know their own application's front "
        "ends, wherever the application is built. Without it they go by name, model and revision, which keeps "
        "applications apart but is no secret.",
    )
    engine: Literal["vllm", "simulated"] = Field("vllm", description="Real vLLM engine cores, or simulated ones.")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vLLM engine arguments of both pools.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of all engines.")
    prefill: PoolSettings = Field(default_factory=PoolSettings, description="The pool that reads prompts.")  # type: ignore[arg-type]
    decode: PoolSettings = Field(default_factory=PoolSettings, description="The pool that writes answers.")  # type: ignore[arg-type]
    transport: TransportSettings = Field(default_factory=TransportSettings, description="How KV blocks travel.")  # type: ignore[arg-type]
    simulator: SimulatorSettings = Field(default_factory=SimulatorSettings, description="Speed of simulated engines.")  # type: ignore[arg-type]
    front_end: FrontEndSettings = Field(default_factory=FrontEndSettings, description="The HTTP server.")  # type: ignore[arg-type]
    admission: AdmissionSettings = Field(
        default_factory=AdmissionSettings,  # type: ignore[arg-type]
        description="Who may begin, who waits in which order, and who is refused.",
    )
    routing: RoutingSection = Field(default_factory=RoutingSection, description="Where requests run.")  # type: ignore[arg-type]
    limits: LimitSettings = Field(default_factory=LimitSettings, description="Bounds and budgets.")  # type: ignore[arg-type]
    objectives: ObjectiveSection = Field(default_factory=ObjectiveSection, description="What clients may expect.")  # type: ignore[arg-type]
    scaling: ScalingSection = Field(default_factory=ScalingSection, description="How the pools scale.")  # type: ignore[arg-type]
    kubernetes: dict[str, Any] = Field(
        default_factory=dict, description="The cluster, for `baton manifest` alone: see kubernetes.md."
    )

    @model_validator(mode="after")
    def _check(self) -> Config:
        for where, args in self._engine_args():
            for name in RESERVED:
                if name in args:
                    raise ValueError(f"{where}.{name} is set by Baton; remove it")
        try:
            pairs = [(name, self.args_of("prefill").get(name), self.args_of("decode").get(name)) for name in MUST_AGREE]
            check_agree(pairs)
        except IncompatibleEngines as problem:
            raise ValueError(str(problem)) from problem
        for role in ROLES:
            self._check_gpus(role)
        self.scaling_policy()
        return self

    def _engine_args(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "engine_args", self.engine_args
        for role in ROLES:
            yield f"{role}.engine_args", self.pool(role).engine_args

    def _check_gpus(self, role: Role) -> None:
        pool, args = self.pool(role), self.args_of(role)
        world = int(args.get("tensor_parallel_size", 1)) * int(args.get("pipeline_parallel_size", 1))
        if pool.num_gpus and pool.num_gpus != world:
            raise ValueError(
                f"{role}.num_gpus is {pool.num_gpus}, but tensor_parallel_size x pipeline_parallel_size is {world}: "
                f"set {role}.num_gpus to {world}"
            )

    def pool(self, role: Role) -> PoolSettings:
        """The settings of a role's pool."""
        return self.prefill if role == "prefill" else self.decode

    def replicas(self) -> dict[str, int]:
        """How many workers each pool starts with."""
        return {role: self.pool(role).replicas for role in ROLES}

    def bounds(self, role: Role) -> PoolBounds:
        """How small and how large a role's pool may get."""
        pool = self.pool(role)
        return self.scaling.bounds(role, pool.replicas, pool.num_gpus)

    def scaling_policy(self) -> ScalingSettings | None:
        """What the pools are sized by; None when they are not scaled."""
        return self.scaling.policy(self.bounds("prefill"), self.bounds("decode"), self.objectives.policy())

    def args_of(self, role: Role) -> dict[str, Any]:
        """The engine arguments of a role: the common ones with the pool's over them."""
        return {**self.engine_args, **self.pool(role).engine_args}

    @property
    def model_name(self) -> str:
        """The model id that clients use."""
        if self.served_model_name:
            return self.served_model_name
        return "SmolLM2-135M-Instruct" if self.model == DEMO_MODEL else self.model.rstrip("/").rsplit("/", 1)[-1]

    def engine_settings(self, role: Role) -> EngineSettings:
        """The slice of a worker: everything its engine needs, resolved but for the node's address."""
        pool, args = self.pool(role), self.args_of(role)
        args["served_model_name"] = [self.model_name]
        if not pool.num_gpus and self.engine == "vllm":
            args.setdefault("dtype", cpu_dtype())
        if self.revision is not None:
            args["revision"] = self.revision
        if pool.nodes > 1:
            args.setdefault("distributed_executor_backend", "ray")
        elif not pool.num_gpus or pool.num_gpus > 1:
            args.setdefault("distributed_executor_backend", "mp")
        return EngineSettings(
            role=role,
            kind=self.engine,
            model=model_dir(self.model),
            args=args,
            hang_s=self.limits.engine_hang_s,
            start_timeout_s=self.limits.start_timeout_s,
            pull_timeout_s=self.limits.pull_timeout_s,
            token=self.token(),
            events=self.routing.cache_aware and args.get("enable_prefix_caching") is not False,
            env={**(self._cpu_env(role) if not pool.num_gpus else {}), **self.env, **pool.env},
            pinned_threads=0 if pool.num_gpus else self._pinned_threads(role),
            transport=self.transport,
            simulator=self.simulator,
        )

    def _cpu_env(self, role: Role) -> dict[str, str]:
        # vLLM's own binding puts engines of one machine on the same cores, and its workers poll for a second.
        return {
            "OMP_NUM_THREADS": str(self._threads(role)),
            BIND_ENV: "nobind",
            SPIN_ENV: "0.002",
        }

    def _cores_of_an_engine(self) -> int:
        return (os.cpu_count() or 1) // (self.bounds("prefill").most + self.bounds("decode").most)

    def _threads(self, role: Role) -> int:
        threads, share = self.pool(role).threads, self._cores_of_an_engine()
        if threads != "auto":
            return threads
        return share - 1 if share >= SHARE_TO_PIN else max(1, share)

    def _pinned_threads(self, role: Role) -> int:
        """Threads that get cores of their own: all, where each engine has a core more for its other processes."""
        threads, share = self._threads(role), self._cores_of_an_engine()
        return threads if threads < share and share >= SHARE_TO_PIN else 0

    def token(self) -> str:
        """What a call has to carry for the workers of this application to take it.

        The same for the same name, model and revision, so that an update of anything else leaves old and new processes
        on speaking terms; two revisions of a model never share work.

        Raises:
            ConfigError: when there is to be a secret, and there is none.
        """
        secret = os.environ.get(self.secret_env, "") if self.secret_env else ""
        if self.secret_env and not secret:
            raise ConfigError(f"secret_env: the environment variable {self.secret_env} is not set or empty")
        identity = json.dumps([self.name, self.model, self.revision])
        return hmac.new(secret.encode(), identity.encode(), hashlib.sha256).hexdigest()

    def api_keys(self) -> tuple[str, ...]:
        """The configured API keys; none means that no key is asked for.

        Raises:
            ConfigError: when a configured source has no keys, so that a typo can't open the server.
        """
        keys: list[str] = []
        if path := self.front_end.api_keys_file:
            try:
                keys += [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
            except OSError as error:
                raise ConfigError(f"front_end.api_keys_file: can't read {path}: {error.strerror}") from error
        if name := self.front_end.api_keys_env:
            keys += [key.strip() for key in os.environ.get(name, "").split(",") if key.strip()]
        if not keys and (self.front_end.api_keys_file or self.front_end.api_keys_env):
            raise ConfigError("API keys are configured, but the file or environment variable has none: add a key")
        return tuple(keys)


def cpu_dtype() -> str:
    """The dtype that this machine's CPU is fastest in: without instructions for it, bfloat16 is 14 times slower."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def model_dir(model: str) -> str:
    """The directory of `model`, where it is the demo model; else `model` as it is."""
    if model != DEMO_MODEL:
        return model
    from runtime.demo_model import demo_model_dir

    return str(demo_model_dir(build=False))
