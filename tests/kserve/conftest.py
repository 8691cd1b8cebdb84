"""Predictors as KServe starts them, on simulated engines; `BATON_KSERVE_ENGINE=vllm` takes real ones."""

from __future__ import annotations

import json
import os
import re
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

from tests.conftest import MARK, MODEL, ROOT, free_port, marked, wait_for

KEY = "test-key"
REAL = os.environ.get("BATON_KSERVE_ENGINE") == "vllm"
START_S = 500 if REAL else 240
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
        """The end of the predictor's log."""
        return "\n".join(self.log.read_text().splitlines()[-60:])

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas, of any application."""
        replica = re.compile(rf"ray::ServeReplica:[^:]+:{deployment}\b")
        return sorted(pid for pid, command in marked(self.mark).items() if replica.match(command))

    def terminate(self) -> int:
        """SIGTERM, as the kubelet sends it; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@contextmanager
def predictor(folder: Path, settings: dict[str, Any], *options: str, mark: str | None = None) -> Iterator[Predictor]:
    """A predictor until the block ends; then SIGTERM, exit status 0, and unless `mark` was given nothing is left."""
    own = mark is None
    mark = mark or uuid.uuid4().hex
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
                **os.environ,
                **({} if own else ray_folder(mark)),
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
        if own:
            assert wait_for(lambda: not marked(mark), 30), f"processes left behind: {marked(mark)}"
    finally:
        running.client.close()
        if process.poll() is None:
            process.kill()
            process.wait()
        if own:
            kill_marked(mark)


def ray_folder(mark: str) -> dict[str, str]:
    """`ray start` leaves its cluster's address for others to find: in a folder of the test's own."""
    return {"RAY_TMPDIR": f"/tmp/ray-{mark[:8]}"}


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
def ray_head() -> Iterator[tuple[str, str]]:
    """A Ray cluster's head, as a pod of KubeRay would run it: its address and its mark."""
    mark, port = uuid.uuid4().hex, free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            **ray_folder(mark),
            "PYTHONPATH": str(ROOT),
            "RAY_process_group_cleanup_enabled": "1",
            MARK: mark,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f"127.0.0.1:{port}", mark
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        wait_for(lambda: not marked(mark), 20)
        kill_marked(mark)
