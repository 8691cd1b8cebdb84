"""The start of a real engine, as far as it goes without one."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from kv_transfer.engine import EngineStartFailed
from kv_transfer.settings import EngineSettings, TransportSettings
from kv_transfer.vllm_engine import VllmEngine


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    """Of an engine that may take a moment to start, in a process whose environment is put back afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    transport = TransportSettings(host="127.0.0.1")  # type: ignore[call-arg]
    return EngineSettings(role="decode", model="", transport=transport, start_timeout_s=0.05)  # type: ignore[call-arg]


async def test_a_start_that_hangs_is_given_up(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM waits for ever in some cases; the replica fails and another one is started."""
    go_on = threading.Event()
    monkeypatch.setattr(VllmEngine, "_start_blocking", lambda *_: go_on.wait())
    with pytest.raises(EngineStartFailed, match=r"decode engine did not start: not within 0.05 s"):
        await VllmEngine.start(settings)
    go_on.set()


async def test_a_start_that_fails_says_why(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where vLLM itself has waited too long for something."""

    def fail(*_: Any) -> None:
        raise TimeoutError("no handshake")

    monkeypatch.setattr(VllmEngine, "_start_blocking", fail)
    with pytest.raises(EngineStartFailed, match="decode engine did not start: no handshake"):
        await VllmEngine.start(settings)
