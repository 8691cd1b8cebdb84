"""Let a prefill engine release the blocks of its own handoffs.

In vLLM 0.32 blocks that nobody will pull are released by a notification over NIXL. Any decode engine can send it, but
the prefill engine can't: it would first have to shake hands with itself, which NIXL refuses. So with the last decode
engine gone, nobody could release anything before the lease had run out. NIXL does carry notifications of an agent to
itself, and in Baton's engines a release that meets its own engine goes this way.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Have vLLM's NIXL workers of this process take releases of their own blocks."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    read = NixlPullConnectorWorker._read_blocks_for_req

    def read_or_release(worker: Any, leg_id: str, meta: Any) -> None:
        if meta.remote.engine_id == worker.engine_id:
            release(worker, meta.remote.request_id)
        else:
            read(worker, leg_id, meta)

    if read.__name__ != read_or_release.__name__:  # else it is done already
        NixlPullConnectorWorker._read_blocks_for_req = read_or_release


def release(worker: Any, request_id: str) -> None:
    """Tell this worker, as its only reader, that the blocks of a finished prefill are not needed any more.

    Readers that told so before (of a decode engine with more ranks) don't count. A second release finds nothing.
    """
    if request_id not in worker._reqs_to_send and request_id not in worker._reqs_to_process:
        return
    worker.consumer_notification_counts_by_req.pop(request_id, None)
    worker.expected_consumer_notifications_by_req.pop(request_id, None)
    worker.nixl_wrapper.send_notif(worker.nixl_wrapper.name, notif_msg=f"{request_id}:1".encode())
