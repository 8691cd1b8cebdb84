"""A simulated engine core in a process of its own, speaking vLLM's ZMQ protocol: what vLLM's own server is measured on.

`python -m benchmarks.zero_time_core MODEL PORT` runs vLLM's unchanged API server in front of it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm import __version__
from vllm.engine.arg_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.v1.engine import (
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    EngineCoreRequestType,
    UtilityOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from kv_transfer.settings import EngineSettings, SimulatorSettings
from kv_transfer.simulator import SimulatedEngine

WINDOW = 8192
IDENTITY = (0).to_bytes(2, "little")


def core(model: str, addresses: dict[str, str]) -> None:
    """Run the engine core until the process is ended."""
    asyncio.run(_core(model, addresses))


async def _core(model: str, addresses: dict[str, str]) -> None:
    settings = EngineSettings(
        role="decode",
        kind="simulated",
        model=model,
        args={"max_model_len": WINDOW},
        simulator=SimulatorSettings(zero_time=True),  # type: ignore[call-arg]
    )
    engine = await SimulatedEngine.start(settings)
    context = zmq.asyncio.Context()
    requests, outputs = context.socket(zmq.DEALER), context.socket(zmq.PUSH)
    requests.setsockopt(zmq.IDENTITY, IDENTITY)
    requests.connect(addresses["input_address"])
    outputs.connect(addresses["output_address"])
    await requests.send(msgspec.msgpack.encode(_ready(engine)))
    await asyncio.gather(_take(engine, requests, outputs), _give(engine, outputs))


def _ready(engine: SimulatedEngine) -> EngineCoreReadyResponse:
    return EngineCoreReadyResponse(
        max_model_len=WINDOW,
        num_gpu_blocks=engine.facts.num_blocks,
        block_size=engine.facts.block_tokens,
        dp_stats_address=None,
        dtype="bfloat16",
        vllm_version=__version__,
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        instance_id="zero-time",
        supports_lora=False,
        max_loras=0,
    )


async def _take(engine: SimulatedEngine, requests: Any, outputs: Any) -> None:
    decode_request, decode, encoder = MsgpackDecoder(EngineCoreRequest), MsgpackDecoder(), MsgpackEncoder()
    while True:
        kind, *frames = await requests.recv_multipart()
        if kind == EngineCoreRequestType.ADD.value:
            await engine.add(decode_request.decode(frames))
        elif kind == EngineCoreRequestType.ABORT.value:
            await engine.abort(decode.decode(frames))
        elif kind == EngineCoreRequestType.UTILITY.value:
            _, call_id, method, _ = decode.decode(frames)
            result = UtilityResult(("generate",) if method == "get_supported_tasks" else None)
            answer = EngineCoreOutputs(utility_output=UtilityOutput(call_id, result=result))
            await outputs.send_multipart(encoder.encode(answer))


async def _give(engine: SimulatedEngine, outputs: Any) -> None:
    encoder = MsgpackEncoder()
    while True:
        batch = await engine.outputs()
        batch.scheduler_stats = None  # a plain engine core's statistics have no details of each step
        if batch.outputs:
            await outputs.send_multipart(encoder.encode(batch))


async def serve(model: str, port: int) -> None:
    """vLLM's API server, with its engine core in another process."""
    parser = make_arg_parser(FlexibleArgumentParser())
    line = ["--model", model, "--served-model-name", "zero", "--max-model-len", str(WINDOW), "--host", "127.0.0.1"]
    args = parser.parse_args([*line, "--port", str(port), "--disable-uvicorn-access-log"])
    folder = tempfile.mkdtemp(prefix="zero-time-")
    addresses = {f"{way}_address": f"ipc://{folder}/{way}" for way in ("input", "output")}
    process = multiprocessing.get_context("spawn").Process(target=core, args=(model, addresses), daemon=True)
    process.start()
    listen_address, sock = setup_server(args, reuse_port=False)
    try:
        await run_server_worker(listen_address, sock, args, client_config=addresses)
    finally:
        process.terminate()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
