"""A real Prometheus that scrapes revisions as a PodMonitor would, and `baton canary` that asks it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import ROOT, free_port, wait_for

STEP_S = 2


@contextmanager
def prometheus(
    folder: Path, ports: dict[str, int], every: str = "500ms", hosts: Sequence[str] = ("127.0.0.1",)
) -> Iterator[str]:
    """Its URL. `ports`: where each revision of the service `llm` exports its metrics.

    `hosts`: names of this machine; each is scraped as if a front end of its own told the same.
    """
    binary = shutil.which("prometheus")
    if not binary:
        pytest.skip("no prometheus: install it (Debian has a package)")
    targets = [
        {"targets": [f"{host}:{port}" for host in hosts], "labels": {"baton_name": "llm", "baton_revision": revision}}
        for revision, port in ports.items()
    ]
    scrape = {"job_name": "baton", "scrape_interval": every, "scrape_timeout": every, "static_configs": targets}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    port = free_port()
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_for(lambda: answers(f"{url}/-/ready"), 60), (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def baton_canary(action: str, url: str, canary: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """The command's exit status, its last line and its errors."""
    command = [sys.executable, "-m", "runtime.cli", "canary", action, "--prometheus", url, "--name", "llm"]
    command += ["--stable", "stable", "--canary", canary, "--step-s", str(STEP_S), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads((done.stdout.splitlines() or ["{}"])[-1]), done.stderr
