"""The servers that are measured, each a command that ends with what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
STOP_S = 60.0


@contextmanager
def running(command: list[str], ready: str, port: int, env: dict[str, str] | None = None) -> Iterator[str]:
    """A server, once it has said `ready`, until the block ends; gives its URL.

    Args:
        env: what to change in the environment.

    Raises:
        SystemExit: it ended by itself, with the last that it said.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=300)
    try:
        for line in process.stdout:
            said.append(line)
            if ready in line:
                break
        else:
            raise SystemExit("".join(said))
        # A pipe that nobody reads fills up, and the server would stand still.
        threading.Thread(target=_keep_reading, args=(process.stdout, said), daemon=True).start()
        yield f"http://127.0.0.1:{port}"
        if process.poll() is not None:
            raise SystemExit("".join(said))
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep_reading(output: IO[str], said: deque[str]) -> None:
    with output:
        said.extend(output)
