"""Where each half of a request runs: a pure function of the request and the snapshot."""

from __future__ import annotations

from runtime.policy.types import Disaggregated, Local, Plan, Refused, RequestView, Snapshot, WorkerView


def route(request: RequestView, snapshot: Snapshot) -> Plan | Refused:
    """The least loaded decode worker, and the least loaded prefill worker where the request can be disaggregated.

    Without a prefill worker the decode worker reads the prompt itself, and without a decode worker a prefill worker
    writes the answer: slower for others, but nothing waits for a pool that may never come back.
    """
    if not snapshot.decode and not snapshot.prefill:
        return Refused("no_workers")
    if not snapshot.decode:
        return Local(min(snapshot.prefill, key=_load).engine_id, "no_decode_workers")
    decode = min(snapshot.decode, key=_load).engine_id
    if not request.can_disaggregate:
        return Local(decode, "needs_prompt_logprobs")
    if not snapshot.prefill:
        return Local(decode, "no_prefill_workers")
    return Disaggregated(min(snapshot.prefill, key=_load).engine_id, decode)


def _load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.tokens, worker.requests, worker.engine_id
