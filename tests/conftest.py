"""What the suites share: Baton as a user starts it, and the proof that nothing of it stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import hypothesis
from prometheus_client.parser import text_string_to_metric_families

from runtime.serving import LOOPBACK

# Before anything imports Ray. A cluster that a driver starts has a token; to find its address alone is not enough.
os.environ.setdefault(*LOOPBACK)
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).parent.parent
MODEL = "SmolLM2-135M-Instruct"
MARK = "BATON_TEST_RUN"

# A busy machine is no failure, and what passed once passes again: `HYPOTHESIS_PROFILE=explore` looks for news.
hypothesis.settings.register_profile("baton", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "baton"))


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until `condition` holds; whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def marked(mark: str) -> dict[int, str]:
    """Living processes that carry `mark` in their environment: pid and command line."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            environ = (proc / "environ").read_bytes()
            state = (proc / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if f"{MARK}={mark}".encode() in environ and state != "Z":
                found[int(proc.name)] = (proc / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue  # it ended while we looked, or is a kernel thread
    return found


def ray_address(mark: str) -> str:
    """Of the Ray cluster whose processes carry `mark`: others may run on the machine."""
    commands = [command for command in marked(mark).values() if "/raylet --" in command]
    return re.findall(r" --gcs-address=(\S+)", commands[0])[-1]


@dataclass
class Server:
    """A running `baton serve`."""

    process: subprocess.Popen[str]
    url: str
    mark: str
    lines: list[str]
    start_s: float
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas."""
        name = f"ray::ServeReplica:baton:{deployment}"
        return sorted(pid for pid, command in marked(self.mark).items() if command.startswith(name))

    def ray_address(self) -> str:
        """Of this server's own Ray cluster."""
        return ray_address(self.mark)

    def values(self, name: str, **labels: str) -> list[float]:
        """A metric's values, of all of its series that have these labels; the front end that is asked tells of all."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return [sample.value for sample in samples if labels.items() <= sample.labels.items()]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of `values`."""
        return sum(self.values(name, **labels))

    def engine_cores(self, deployment: str) -> list[int]:
        """Processes of a deployment's real engine cores: children of its replicas."""
        replicas = [f"PPid:\t{pid}\n" for pid in self.pids(deployment)]
        cores = [pid for pid, command in marked(self.mark).items() if command.startswith("VLLM::EngineCore")]
        return [pid for pid in cores if any(line in Path(f"/proc/{pid}/status").read_text() for line in replicas)]

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """POST `body` as JSON."""
        return self.client.post(path, json=body, **kwargs)

    def complete(self, prompt: Any, **params: Any) -> dict[str, Any]:
        """A text completion that must succeed."""
        response = self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **params})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def chat(self, content: str, **params: Any) -> dict[str, Any]:
        """A chat completion that must succeed."""
        messages = [{"role": "user", "content": content}]
        response = self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **params})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


def baton_serve(
    config: Path, *, timeout_s: float = 400, env: dict[str, str] | None = None
) -> AbstractContextManager[Server]:
    """`baton serve --config CONFIG` until the block ends; then Ctrl-C, and no process of it may be left."""
    port = free_port()
    command = ["baton", "serve", "--config", str(config), "--port", str(port)]
    return serving(command, port, "ready: curl", timeout_s=timeout_s, env=env)


@contextmanager
def serving(
    command: list[str], port: int, ready: str, *, timeout_s: float = 400, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A command of the environment that serves on `port` once it has said `ready`, as `baton_serve`."""
    mark, started = uuid.uuid4().hex, time.monotonic()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, **(env or {}), MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if ready in line:
                break
            assert time.monotonic() - started < timeout_s, "\n".join(lines)
        assert lines and ready in lines[-1], f"{command[0]} did not get ready:\n" + "\n".join(lines)
        server = Server(process, f"http://127.0.0.1:{port}", mark, lines, time.monotonic() - started)
        # A pipe that nobody reads fills up, and the server would stand still.
        threading.Thread(target=_keep_reading, args=(process.stdout, lines), daemon=True).start()
        yield server
        server.client.close()
    finally:
        stop(process, mark)
        process.stdout.close()


def _keep_reading(output: IO[str], lines: list[str]) -> None:
    with suppress(ValueError):  # it is closed
        lines.extend(line.rstrip() for line in output)


def stop(process: subprocess.Popen[str], mark: str) -> None:
    """Ctrl-C, and everything that carries the mark must be gone soon."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
        assert wait_for(lambda: not marked(mark), 15), f"processes left behind: {marked(mark)}"
        assert process.returncode == 0, f"it ended with {process.returncode}"
    finally:
        for pid in marked(mark):  # after a failure, so that the next suite starts clean
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
