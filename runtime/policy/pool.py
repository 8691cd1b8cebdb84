"""A pool of workers in a snapshot: a tuple of their views that knows their order by load."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.policy.types import Load, WorkerView


class Pool(tuple["WorkerView", ...]):
    """The workers of one role. Immutable; `with_view` makes the next pool for much less than a new sort."""

    @classmethod
    def of(cls, views: Iterable[WorkerView]) -> Pool:
        """`views` as a pool."""
        return views if isinstance(views, Pool) else cls(views)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each worker is in the tuple. Shared by the pools that follow from each other."""
        return {view.engine_id: place for place, view in enumerate(self)}

    @cached_property
    def _order(self) -> list[tuple[Load, int]]:
        """Load and place of each worker, least loaded first."""
        return sorted((view.load, place) for place, view in enumerate(self))

    @cached_property
    def least_token_s(self) -> float:
        """Seconds that the quickest worker takes to read a token; carried on, so it may be one of an earlier view."""
        return min([view.token_s for view in self])

    def find(self, engine_id: str) -> WorkerView | None:
        """The view of a worker, if it is in this pool."""
        place = self.places.get(engine_id)
        return None if place is None else self[place]

    def with_view(self, view: WorkerView) -> Pool:
        """This pool with a newer view of one of its workers.

        Raises:
            KeyError: the worker is not in this pool.
        """
        place = self.places[view.engine_id]
        views = list(self)
        views[place] = view
        pool = Pool(views)
        order = self._order.copy()
        del order[bisect_left(order, (self[place].load, place))]
        insort(order, (view.load, place))
        pool.__dict__.update(places=self.places, _order=order, least_token_s=min(self.least_token_s, view.token_s))
        return pool

    def least_loaded(self, count: int, spread: int) -> list[WorkerView]:
        """So many workers with the least load. Where more than that are equal, `spread` says which ones."""
        if len(self) <= count:
            return list(self)
        order = self._order
        least = order[0][0]
        if order[count][0] != least:  # so many or fewer are equal
            return [self[place] for _, place in islice(order, count)]
        equal = bisect_right(order, (least, len(self)))
        return [self[order[(spread + number) % equal][1]] for number in range(count)]
