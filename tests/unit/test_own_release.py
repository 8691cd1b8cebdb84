"""A prefill engine's release of its own blocks, with vLLM's own worker class and a real NIXL agent."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kv_transfer import own_release
from kv_transfer.nixl import transport_env
from kv_transfer.settings import TransportSettings


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's worker side of the connector of engine `p`, as far as notifications go, in a process like an engine's."""
    from nixl._api import nixl_agent, nixl_agent_config

    for name, value in transport_env(TransportSettings(host="127.0.0.1"), "127.0.0.1", 0).items():  # type: ignore[call-arg]
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(NixlPullConnectorWorker, "_read_blocks_for_req", NixlPullConnectorWorker._read_blocks_for_req)
    own_release.install()
    own_release.install()  # twice does no harm
    worker = object.__new__(NixlPullConnectorWorker)
    worker.engine_id, worker.transfer_topo = "p", SimpleNamespace()
    worker.nixl_wrapper = nixl_agent("own", nixl_agent_config(backends=["UCX"]))
    worker._reqs_to_send, worker._reqs_to_process = {"leg": 60.0}, {"leg"}
    worker.consumer_notification_counts_by_req = defaultdict(int)
    worker.expected_consumer_notifications_by_req = {}
    worker.expired = []
    worker.xfer_stats = SimpleNamespace(record_notification_after_expiry=lambda: worker.expired.append(1))
    worker.others = []
    worker._invalid_remote_engines, worker._remote_agents = set(), {}
    worker._background_nixl_handshake = lambda leg_id, engine_id, meta: worker.others.append(engine_id)
    yield worker
    worker.shutdown = lambda: None  # it has no threads to end


def release(worker: Any, engine_id: str = "p") -> None:
    """What the connector does for a leg that was aborted at once, with the blocks of `leg` on that engine."""
    meta = SimpleNamespace(remote=SimpleNamespace(engine_id=engine_id, request_id="leg"), local_block_ids=[])
    worker._read_blocks_for_req("leg-release", meta)


def told(worker: Any, seconds: float = 5.0) -> set[str]:
    """The requests that the worker tells its scheduler to free, as soon as there are some."""
    deadline = time.monotonic() + seconds
    while not (done := worker._get_new_notifs()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return set(done)


def test_an_engine_frees_its_own_blocks(worker: Any) -> None:
    """Nobody else is needed, and a second release finds nothing."""
    release(worker)
    assert told(worker) == {"leg"}
    assert (worker._reqs_to_send, worker._reqs_to_process) == ({}, set())
    release(worker)
    assert told(worker, 0.2) == set()
    assert (worker.expired, worker.others) == ([], [])


def test_readers_that_stopped_half_way_dont_count(worker: Any) -> None:
    """One of two ranks of a decode engine has pulled, the other one never will: the blocks are free all the same."""
    worker.nixl_wrapper.send_notif("own", notif_msg=b"leg:2")
    deadline = time.monotonic() + 5
    while not worker.consumer_notification_counts_by_req and time.monotonic() < deadline:
        assert worker._get_new_notifs() == set()
    assert worker.consumer_notification_counts_by_req == {"leg": 1}
    release(worker)
    assert told(worker) == {"leg"}


def test_another_engines_blocks_go_vllms_way(worker: Any) -> None:
    """As without Baton."""
    release(worker, "q")
    assert worker.others == ["q"]
