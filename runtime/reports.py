"""What one front end knows of the fleet at one moment: small frozen records that go to whoever sizes the pools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.policy.scaling_records import Answer, FleetLoad
from runtime.policy.types import Cost

if TYPE_CHECKING:
    from runtime.client_view import Totals
    from runtime.cluster import Cluster
    from runtime.policy.types import WorkerView


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker as one front end sees it. Loads are of all front ends, where the worker has published them."""

    engine_id: str
    pool: str
    state: str  # of `runtime.worker.State`
    queued_requests: int = 0
    queued_tokens: int = 0
    streams: int = 0
    kv_use: float | None = None  # 0 to 1
    pinned_blocks: int = 0  # of handoffs of this front end
    num_blocks: int = 0
    read: Cost | None = None
    step: Cost | None = None
    max_streams: int | None = None


@dataclass(frozen=True, slots=True)
class FrontEndReport:
    """One front end. Totals and histograms grow from its start on.

    Attributes:
        waiting: requests that no worker has yet, with `waiting_tokens` prompt tokens.
        ttft, itl: counts over `runtime.client_view.BOUNDS_S`.
        metrics_host, metrics_port: where this front end alone can be scraped; port 0: nowhere.
    """

    front_end: str
    workers: tuple[WorkerReport, ...]
    waiting: int
    waiting_tokens: int
    totals: Totals
    ttft: tuple[int, ...]
    itl: tuple[int, ...]
    metrics_host: str = ""
    metrics_port: int = 0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """What came of the reports: one load, one answer.

    Attributes:
        scaled: whether somebody follows the answer; otherwise it says what the settings give, or what there is if more.
        front_ends: where each front end alone can be scraped: its id, host and port.
    """

    load: FleetLoad
    answer: Answer
    scaled: bool = False
    front_ends: tuple[tuple[str, str, int], ...] = ()


def report(front_end: str, cluster: Cluster, metrics: tuple[str, int] = ("", 0)) -> FrontEndReport:
    """The report of the front end with this id."""
    fleet, seen = cluster.fleet, cluster.seen
    snapshot = fleet.snapshot()
    views = {view.engine_id: view for pool in (snapshot.prefill, snapshot.decode) for view in pool}
    pinned = cluster.ledger.pinned_blocks()
    workers = []
    for engine_id, worker in fleet.workers.items():
        facts = worker.link.facts
        blank = WorkerReport(engine_id, facts.role, worker.state.value, num_blocks=facts.num_blocks)
        view = views.get(engine_id)
        workers.append(_seen(blank, view, pinned[engine_id]) if view else blank)
    waiting, tokens = cluster.waiting()
    return FrontEndReport(
        front_end,
        tuple(workers),
        waiting,
        tokens,
        replace(seen.totals),
        tuple(seen.ttft.counts),
        tuple(seen.itl.counts),
        *metrics,
    )


def _seen(blank: WorkerReport, view: WorkerView, pinned: int) -> WorkerReport:
    prefills = blank.pool == "prefill"
    published = view.queued_tokens is not None
    kv_use = None
    if view.free_blocks is not None and blank.num_blocks:
        kv_use = max(0.0, 1.0 - view.free_blocks / blank.num_blocks)
    return replace(
        blank,
        queued_requests=view.queued_requests if published or not prefills else view.requests,
        queued_tokens=view.queued_tokens or 0 if published or not prefills else view.tokens,
        streams=view.streams if published or prefills else view.requests,
        kv_use=kv_use,
        pinned_blocks=pinned,
        read=view.prefill,
        step=view.step,
        max_streams=view.max_streams,
    )
