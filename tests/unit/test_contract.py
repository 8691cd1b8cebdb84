"""What Baton uses of vLLM's and Ray's internals is still there: an upgrade that moves something fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import ray
import vllm
from ray.serve._private.common import ReplicaQueueLengthInfo
from ray.serve._private.replica_result import ActorReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient

from kserve_adapter.canary import prometheus
from kserve_adapter.manifest.serving import RUNNING
from runtime.cluster import Cluster
from runtime.metric_reference import VLLM


def test_versions() -> None:
    """The code is written against these; another version needs a look at everything below."""
    assert (vllm.__version__, ray.__version__) == ("0.32.0", "2.60.0")


REQUEST_FIELDS = {
    # Made by vLLM's front end from the client's request, and passed on as they are:
    *("request_id", "external_req_id", "prompt_token_ids", "prompt_is_token_ids", "prompt_embeds", "mm_features"),
    *("sampling_params", "pooling_params", "arrival_time", "lora_request", "cache_salt", "priority", "trace_headers"),
    *("reasoning_ended", "reasoning_parser_kwargs", "session_id"),
    # Overwritten at the edge (`live_request.trusted`), so that no client chooses a rank or hints at blocks:
    *("data_parallel_rank", "kv_hints"),
    # Set by Baton's own legs:
    "abort_immediately",
    # Of several front ends or data-parallel waves on one engine, which Baton does not have, and of streamed input:
    *("client_index", "current_wave", "resumable"),
}


def test_every_field_of_a_request_is_known() -> None:
    """A new one might let a client choose a worker, a block or a host: somebody has to look at it first."""
    assert set(EngineCoreRequest.__struct_fields__) == REQUEST_FIELDS


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (
            EngineCoreOutput,
            {"request_id", "new_token_ids", "finish_reason", "kv_transfer_params", "prefill_stats", "new_logprobs"},
        ),
        (EngineCoreOutputs, {"outputs", "timestamp", "scheduler_stats", "utility_output"}),
        (SamplingParams, {"extra_args", "max_tokens", "min_tokens", "seed", "logit_bias", "structured_outputs"}),
    ],
)
def test_fields_that_are_used(record: Any, fields: set[str]) -> None:
    """Legs are built from these, and outputs read by them."""
    assert fields <= set(record.__struct_fields__)


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(Cluster) if name.endswith("_async")])
def test_the_cluster_overrides_what_there_is(name: str) -> None:
    """A method that vLLM renamed would be dead code in `Cluster`, and the base's would raise."""
    ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (Cluster, EngineCoreClient))
    assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (EngineCoreClient.make_async_mp_client, ["vllm_config", "executor_class", "log_stats"]),
        (build_app, ["args", "supported_tasks", "model_config"]),
        (init_app_state, ["engine_client", "state", "args", "supported_tasks"]),
        (AsyncLLM.add_request, ["self", "request_id", "prompt", "params"]),
        (RequestRouter.update_replicas, ["self", "replicas"]),
        (RequestRouter._choose_replica_for_request, ["self", "pending_request", "is_retry"]),
        (RequestRouter.create_replica_wrapper, ["self", "replica_info"]),
        (RunningReplica.try_send_request, ["self", "pr", "with_rejection"]),
        (ActorReplicaResult.get_rejection_response, ["self"]),
        (NixlPullConnectorWorker._read_blocks_for_req, ["self", "req_id", "meta"]),
        (ReplicaQueueLengthInfo, ["accepted", "num_ongoing_requests"]),
    ],
)
def test_functions_that_are_called_or_replaced(function: Callable[..., Any], parameters: list[str]) -> None:
    """By their first parameters."""
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_what_is_patched() -> None:
    """The front end puts its client in by this name, and engines shorten the wait of their model workers by this."""
    assert "EngineCoreClient.make_async_mp_client" in inspect.getsource(AsyncLLM.__init__)
    defaults = [
        p.name for p in inspect.signature(SpinCondition.__init__).parameters.values() if p.default is not p.empty
    ]
    assert defaults == ["busy_loop_s"]


def test_where_a_cpus_core_is_reserved_for_transfers() -> None:
    """`kv_transfer.shared_cores` names none, which nothing else asks for."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    source = inspect.getsource(NixlBaseConnectorWorker.__init__)
    assert "current_platform.discover_numa_topology()" in source
    assert "if rsv_cores_for_kv:" in source


def test_what_seeded_sampling_on_a_cpu_needs() -> None:
    """`kv_transfer.cpu_sampling` wraps these two, between which the generators are used."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.sample_tokens)
    assert "self._sample(" in source and "self._bookkeeping_sync(" in source
    assert "self.discard_request_mask.np" in inspect.getsource(GPUModelRunner._bookkeeping_sync)


def test_an_output_is_plain_by_default() -> None:
    """Outputs of several steps are joined where they carry nothing else, which is told by these values."""
    plain = EngineCoreOutput(request_id="", new_token_ids=[])
    rest = set(EngineCoreOutput.__struct_fields__) - {"request_id", "new_token_ids"}
    assert {name for name in rest if getattr(plain, name) is not None} == {"num_nans_in_logits"}


def test_a_call_names_its_engine_first() -> None:
    """Serve's pending request carries the arguments of the call, by which the router chooses."""
    assert "args" in {field.name for field in dataclasses.fields(PendingRequest)}


def test_where_serve_opens_a_replicas_server() -> None:
    """By this name, which `kv_transfer.serve_replica` replaces."""
    from ray.serve._private import replica

    assert "add_port_to_grpc_server(self._server" in inspect.getsource(replica)


def test_who_chooses_the_replicas_that_leave() -> None:
    """Serve's scheduler asks itself by this name, which `runtime.departures` replaces, and knows who runs."""
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    method = DeploymentScheduler._get_replicas_to_stop
    assert list(inspect.signature(method).parameters)[:3] == ["self", "deployment_id", "max_num_to_stop"]
    assert "self._get_replicas_to_stop(" in inspect.getsource(DeploymentScheduler.schedule)
    assert "self._running_replicas[deployment_id]" in inspect.getsource(method)


def test_vllms_metrics_are_called_so() -> None:
    """Those that docs/metrics.md describes, that autoscalers ask for, and that canaries are judged by."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import stats
    from vllm.v1.metrics import loggers

    texts = "".join(inspect.getsource(module) for module in (stats, loggers))
    judged = {
        f"vllm:{name.removesuffix('_total').removesuffix('_bucket').removesuffix('_sum')}"
        for name in (prometheus.FINISHED, prometheus.TTFT, prometheus.ITL, prometheus.TOKENS, prometheus.DECODE_S)
    }
    assert not {name for name in {*VLLM, *judged, RUNNING} if f'"{name}"' not in texts}
