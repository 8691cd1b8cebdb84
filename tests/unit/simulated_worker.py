"""A worker with a simulated engine, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kv_transfer.settings import EngineSettings, TransportSettings
from kv_transfer.worker import EngineWorker
from runtime.config import Role

TOKEN = "the application's"


@asynccontextmanager
async def simulated_worker(role: Role, folder: Path, **settings: Any) -> AsyncIterator[EngineWorker]:
    """A worker that takes calls with `TOKEN`; its model's configuration is written to `folder`."""
    (folder / "config.json").write_text('{"vocab_size": 20000, "max_position_embeddings": 512}')
    resolved = EngineSettings(
        role=role,
        kind="simulated",
        model=str(folder),
        token=TOKEN,
        transport=TransportSettings(host="127.0.0.1"),  # type: ignore[call-arg]
        **settings,
    )
    worker = EngineWorker()
    await worker.start(resolved)
    yield worker
    worker.shutdown()
