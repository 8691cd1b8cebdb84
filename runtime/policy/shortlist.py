"""Which workers are looked at for a request: a few of each pool, however large the pools are."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from runtime.policy.pool import Pool
from runtime.policy.types import RequestView, WorkerView

SCANNED = 32
"""So many of the workers that hold most of a prompt are looked at first."""

ALIKE = 1.5
"""A worker that takes more than so many times as long for a token as the quickest one of its pool is a slow one."""

Held = tuple[WorkerView, int]
"""A worker, and how many tokens of the prompt need not be computed there; the last one always is."""


class Shortlist(NamedTuple):
    """The workers of each pool that are looked at: the least loaded ones first, then holders of the prompt."""

    prefill: list[Held]
    decode: list[Held]


def shortlist(prefill: Pool, decode: Pool, request: RequestView, count: int, spread: int) -> Shortlist:
    """The least loaded workers of each pool, and those that hold more of the prompt than one of these.

    A worker that holds no more than any of the less loaded ones has nothing to offer, nor do those after it, who hold
    even less: the search ends there. (That spares it the system prompt, which everybody holds.) It goes on when the
    less loaded ones are slow, for a quicker worker is then welcome with the same tokens.

    Args:
        count: so many of a pool for their load, and at most as many for what they hold.
        spread: says which ones of equally loaded workers.
    """
    held, most = request.cached.get, request.prompt_tokens - 1
    readers, least_read = _least_loaded(prefill, request, count, spread)
    writers, least_written = _least_loaded(decode, request, count, spread)
    least = min(least_read, least_written)
    reading: list[Held] = []
    writing: list[Held] = []
    for name in islice(request.cached, SCANNED):
        tokens = held(name, 0)
        if tokens > most:
            tokens = most
        if tokens <= least:
            break
        if tokens > least_read and (worker := prefill.find(name)):
            reading.append((worker, tokens))
        elif tokens > least_written and (worker := decode.find(name)):
            writing.append((worker, tokens))
    if reading:
        readers += _soonest(reading, readers, request, count)
    if writing:
        writers += _soonest(writing, writers, request, count)
    return Shortlist(readers, writers)


def _least_loaded(pool: Pool, request: RequestView, count: int, spread: int) -> tuple[list[Held], int]:
    """These workers, and how many tokens any other has to hold to be worth a look."""
    held, most = request.cached.get, request.prompt_tokens - 1
    workers = [
        (worker, tokens if (tokens := held(worker.engine_id, 0)) < most else most)
        for worker in pool.least_loaded(count, spread)
    ]
    if len(workers) == len(pool):
        return workers, most
    if min([worker.token_s for worker, _ in workers]) > ALIKE * pool.least_token_s:
        return workers, -1
    return workers, min([tokens for _, tokens in workers])


def _soonest(holders: list[Held], listed: list[Held], request: RequestView, count: int) -> list[Held]:
    """Those that would have read the prompt first, of the holders that are not listed yet."""
    names = [worker.engine_id for worker, _ in listed]
    others = [held for held in holders if held[0].engine_id not in names]

    def reading_s(held: Held) -> float:
        worker, tokens = held
        return worker.backlog_s + worker.token_s * (request.prompt_tokens - tokens)

    return others if len(others) <= count else sorted(others, key=reading_s)[:count]
