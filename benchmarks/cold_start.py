"""Cold start of a predictor: its model in an S3 store, with and without a warm cache on the node.

    python -m benchmarks.cold_start --bandwidth-mb-s 100
    python -m benchmarks.cold_start --config deploy/config/sim.yaml --rounds 1     # to try it out

Does what a pod does: the init container's `baton fetch` into the node's cache, then `python -m kserve_adapter` until
its model is ready, everything in one pod. Prints the seconds of both, cold (an empty cache) and warm (the model is
there), measured in turns, as medians with the extremes. The store is moto's server on this machine; `--bandwidth-mb-s`
makes it as slow as one that is further away. The kernel's own cache of files is warm in both cases.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.servers import ROOT, running
from kserve_adapter.integrity import SUMS, sha256
from runtime.demo_model import NAME, demo_model_dir
from tests.conftest import free_port
from tests.storage.conftest import BUCKET, Store, moto

PREFIX = "demo/v1"


def publish(store: Store) -> str:
    """Upload the demo model with its checksums; its URI."""
    store.client.create_bucket(Bucket=BUCKET)
    model = demo_model_dir()
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(model.iterdir()))
    store.client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{SUMS}", Body=sums.encode())
    return store.upload(model, PREFIX)


class Relay:
    """A port through which the store is reached at a bounded rate, all connections together."""

    def __init__(self, target: str, bytes_per_s: float) -> None:
        self._host, self._port = target.removeprefix("http://").split(":")
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.url = f"http://127.0.0.1:{started.result(30).sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(self._pump(reader, ours), self._pump(theirs, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                now = self._loop.time()
                self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_s
                await asyncio.sleep(self._free_at - now)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


def fetch_s(uri: str, env: dict[str, str], cache: Path, link: Path) -> float:
    """Seconds of the init container."""
    command = [sys.executable, "-m", "runtime.cli", "fetch", uri, "--cache", str(cache), "--link", str(link)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def ready_s(config: Path, model: Path) -> float:
    """Seconds from the start of the predictor's process until its model is ready."""
    port = free_port()
    command = [sys.executable, "-m", "kserve_adapter", "--config_file", str(config), "--model_dir", str(model)]
    command += ["--model_name", NAME, "--host", "127.0.0.1", "--http_port", str(port), "--grpc_port", str(free_port())]
    started = time.perf_counter()
    with running(command, f"ready: {NAME}", port) as url:
        took = time.perf_counter() - started
        answer = httpx.get(f"{url}/v2/models/{NAME}/ready", timeout=30)
        assert answer.status_code == 200, answer.text
    return took


def told(name: str, values: list[float]) -> str:
    """A line: median with the extremes."""
    return f"{name:30}{statistics.median(values):8.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Measure cold and warm in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/config/demo.yaml")
    parser.add_argument("--bandwidth-mb-s", type=float, metavar="N", help="of the store, in megabytes per second")
    asked = parser.parse_args()
    fetched: dict[str, list[float]] = {"cold": [], "warm": []}
    started: dict[str, list[float]] = {"cold": [], "warm": []}
    with TemporaryDirectory() as folder, contextmanager(moto)(Path(folder) / "moto.log") as store:
        uri, env = publish(store), store.env()
        if asked.bandwidth_mb_s:
            env["AWS_ENDPOINT_URL"] = Relay(store.url, asked.bandwidth_mb_s * 1e6).url
        cache, link = Path(folder) / "cache", Path(folder) / "mnt/models"
        for _ in range(asked.rounds):
            for how in ("cold", "warm"):
                if how == "cold":
                    shutil.rmtree(cache, ignore_errors=True)
                fetched[how].append(fetch_s(uri, env, cache, link))
                started[how].append(ready_s(asked.config, link))
    print(f"{'seconds':30}  median (extremes)")
    for how in ("cold", "warm"):
        print(told(f"{how}: baton fetch", fetched[how]))
        print(told(f"{how}: predictor until ready", started[how]))
        both = [one + other for one, other in zip(fetched[how], started[how], strict=True)]
        print(told(f"{how}: together", both))


if __name__ == "__main__":
    main()
