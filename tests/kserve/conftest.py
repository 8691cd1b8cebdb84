"""Predictors as KServe starts them, on simulated engines; `BATON_KSERVE_ENGINE=vllm` takes real ones."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from runtime.grace import NODE_VARIABLE
from runtime.serving import LOOPBACK
from tests.conftest import MARK, MODEL, ROOT, free_port, marked, ray_address, wait_for

KEY = "test-key"
REAL = os.environ.get("BATON_KSERVE_ENGINE") == "vllm"
START_S = 600.0
"""Longest wait for what takes seconds on a machine of one's own: another suite may have the cores."""

SETTINGS = {
    **yaml.safe_load((ROOT / f"deploy/config/{'demo' if REAL else 'sim'}.yaml").read_text()),
    "front_end": {"api_keys_env": "BATON_API_KEYS", "max_body_bytes": 100_000},
}


@dataclass
class Predictor:
    """A running `python -m kserve_adapter`."""

    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    mark: str
    log: Path
    key: str = KEY

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.client = httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    def status(self, path: str) -> int:
        """The HTTP status of a GET; 0 while nobody listens."""
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return 0

    def ready(self) -> bool:
        """What a readiness probe sees."""
        return self.status(f"/v2/models/{MODEL}/ready") == 200

    def wait_until_ready(self) -> None:
        """Wait for readiness; the log tells why it did not come."""
        assert wait_for(lambda: self.ready() or self.process.poll() is not None, START_S), self.told()
        assert self.process.poll() is None, self.told()

    def told(self) -> str:
        """The end of the predictor's log, without the probes."""
        lines = [
            line for line in self.log.read_text().splitlines() if not re.search("kserve.trace|uvicorn.access", line)
        ]
        return "\n".join(lines[-60:])

    def ray_address(self) -> str:
        """Of the Ray cluster of its own."""
        return ray_address(self.mark)

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas, of any application."""
        replica = re.compile(rf"ray::ServeReplica:[^:]+:{deployment}\b")
        return sorted(pid for pid, command in marked(self.mark).items() if replica.match(command))

    def terminate(self) -> int:
        """SIGTERM, as the kubelet sends it; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(180)


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster's head, as a pod of KubeRay would run it.

    Attributes:
        env: the environment of every process of the cluster. `ray start` leaves its address for others to find: in a
            folder of the test's own. And a head takes up token authentication by itself where a token lies in the home
            directory, while those who join don't: so it is asked of all of them, with a token of the test's own, as
            KubeRay gives pods one. What keeps the suites' other clusters on loopback would keep nodes from joining.
    """

    address: str
    mark: str
    env: dict[str, str]

    def nodes(self) -> int:
        """How many nodes of it run, the head's own among them."""
        return sum("/raylet/raylet" in command.split()[0] for command in marked(self.mark).values() if command)

    def applications(self) -> list[str]:
        """The names of its Serve applications."""
        code = (
            "import json, ray; from ray import serve; "
            f"ray.init(address={self.address!r}, log_to_driver=False, configure_logging=False); "
            "print('told', json.dumps(list(serve.status().applications)))"
        )
        done = subprocess.run([sys.executable, "-c", code], env=self.env, capture_output=True, text=True, timeout=120)
        told = [line for line in done.stdout.splitlines() if line.startswith("told ")]
        assert told, done.stderr
        names: list[str] = json.loads(told[0].removeprefix("told "))
        return names


@contextmanager
def predictor(
    folder: Path, settings: dict[str, Any], *options: str, cluster: RayCluster | None = None
) -> Iterator[Predictor]:
    """A predictor until the block ends; then SIGTERM, exit status 0, and nothing left unless it joined a `cluster`."""
    mark = cluster.mark if cluster else uuid.uuid4().hex
    options = (*options, "--ray_address", cluster.address) if cluster else options
    name = uuid.uuid4().hex[:8]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    http_port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "kserve_adapter", "--config_file", str(path), "--host", "127.0.0.1"]
    command += ["--http_port", str(http_port), "--grpc_port", str(grpc_port), *options]
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **(cluster.env if cluster else os.environ),
                "PYTHONPATH": str(ROOT),
                "BATON_API_KEYS": KEY,
                "PYTHONFAULTHANDLER": "1",
                MARK: mark,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Predictor(process, http_port, grpc_port, mark, log)
    try:
        yield running
        if process.poll() is None:
            assert running.terminate() == 0, running.told()
        if cluster is None:
            assert wait_for(lambda: not marked(mark), 60), f"processes left behind: {marked(mark)}"
    finally:
        running.client.close()
        if process.poll() is None:
            process.kill()
            process.wait()
        if cluster is None:
            kill_marked(mark)


def kill_marked(mark: str) -> None:
    """After a failure, so that the next suite starts clean."""
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where settings and logs are."""
    return tmp_path_factory.mktemp("kserve")


@pytest.fixture(scope="session")
def embedded(folder: Path) -> Iterator[Predictor]:
    """A predictor with everything in its own pod, with an API key."""
    with predictor(folder, SETTINGS, "--grace_period", "30", "--openai_prefix", "/llm") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster of one node, without anything on it."""
    mark, port = uuid.uuid4().hex, free_port()
    folder = Path(f"/tmp/ray-{mark[:8]}")  # short: sockets below it have to fit in 107 characters
    env = {
        **{name: value for name, value in os.environ.items() if name != LOOPBACK[0]},
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(ROOT),
        "RAY_process_group_cleanup_enabled": "1",
        NODE_VARIABLE: "0",  # nothing is to be saved at its end
        MARK: mark,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield RayCluster(f"127.0.0.1:{port}", mark, env)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        wait_for(lambda: not marked(mark), 20)
        kill_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)
