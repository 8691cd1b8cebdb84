"""Which worker holds which KV blocks, as this front end knows it: one index, fed by the events of every worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kv_transfer.block_keys import prompt_keys
from kv_transfer.engine import EngineFacts
from kv_transfer.events import EventFeed
from kv_transfer.index import PrefixIndex
from runtime.engine_board import subscribe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.engine import EngineCoreRequest

logger = logging.getLogger("baton.cache")


class CacheView:
    """Follows the KV events of all workers that Ray Serve announces, and forgets those that it does not any more.

    Args:
        max_blocks: most pairs of block and worker that are remembered.
    """

    def __init__(self, max_blocks: int) -> None:
        self.index: PrefixIndex | None = None  # from the first worker on: it has the block size of the workers
        self.feeds: dict[str, EventFeed] = {}
        self._max_blocks = max_blocks
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, application: str, deployments: Iterable[str]) -> None:
        """Begin to follow the workers of these deployments."""
        loop = asyncio.get_running_loop()
        present: dict[str, set[str]] = {}

        def update(deployment: str, engines: list[dict[str, Any]]) -> None:
            facts = [EngineFacts(**engine) for engine in engines]
            here = {fact.engine_id for fact in facts}
            for gone in present.get(deployment, set()) - here:
                self.leave(gone)
            present[deployment] = here
            for fact in facts:
                self.join(fact)

        def listener(deployment: str) -> Callable[[list[dict[str, Any]]], object]:
            return lambda engines: loop.call_soon_threadsafe(update, deployment, engines)

        for name in deployments:
            subscribe(application, name, listener(name))

    def join(self, facts: EngineFacts) -> None:
        """Follow a worker, if it publishes anything."""
        if not facts.events or facts.engine_id in self._tasks:
            return
        if self.index is None:
            self.index = PrefixIndex(facts.block_tokens, self._max_blocks)
        feed = EventFeed(self.index, facts.engine_id, facts.events, facts.events_replay or None)
        task = asyncio.get_running_loop().create_task(feed.run())
        self.feeds[facts.engine_id], self._tasks[facts.engine_id] = feed, task
        task.add_done_callback(lambda ended: _tell(facts.engine_id, ended))

    def leave(self, engine_id: str) -> None:
        """Forget a worker that is gone."""
        self.feeds.pop(engine_id, None)
        if task := self._tasks.pop(engine_id, None):
            task.cancel()

    def keys_of(self, request: EngineCoreRequest) -> list[int]:
        """The names of a prompt's blocks: tokens, adapter, salt and multimodal items."""
        if self.index is None or request.prompt_embeds is not None:
            return []
        return prompt_keys(
            request.prompt_token_ids or (),
            self.index.block_tokens,
            lora=request.lora_request.lora_name if request.lora_request else None,
            salt=request.cache_salt,
            items=[(item.identifier, item.mm_position.offset) for item in request.mm_features or ()],
        )

    def match(self, keys: list[int], now: float) -> Mapping[str, int]:
        """Tokens of a prompt that each worker holds, most first. Good until the next event."""
        return self.index.match(keys, now) if self.index is not None and keys else {}

    def predict(self, engine_ids: Iterable[str], keys: list[int], now: float) -> None:
        """Expect these workers to hold a prompt's blocks soon."""
        if self.index is not None and keys:
            for engine_id in engine_ids:
                if engine_id in self._tasks:  # one that publishes, and so will be corrected
                    self.index.predict(engine_id, keys, now)

    def close(self) -> None:
        """Follow nobody any more."""
        for engine_id in list(self._tasks):
            self.leave(engine_id)


def _tell(engine_id: str, ended: asyncio.Task[None]) -> None:
    if not ended.cancelled() and (error := ended.exception()) is not None:
        logger.error("the KV events of worker %s are not followed any more: %s", engine_id, error)
