"""What this front end knows of one worker's load: the worker's last news, and what was sent and seen since.

News is a moment old when it comes. So a front end adds what it has sent itself and the worker had not got when it
took its figures (each front end's legs are numbered), and takes off what it has seen done since. A burst within one
period of news spreads over the workers as if each leg were news at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.engine import EngineFacts
from kv_transfer.load import Load, News
from runtime.policy.types import Cost, Disaggregated, Plan, WorkerView


@dataclass(eq=False)
class Charge:
    """What one leg adds to a worker's load, from the plan until its end.

    Attributes:
        tokens: prompt tokens, and those of the answer where it is written.
        reads: prompt tokens to be read here.
        pulls: prompt tokens whose blocks are fetched; they count once the leg is sent.
    """

    tokens: int
    reads: int = 0
    pulls: int = 0
    writes: bool = False
    number: int | None = None  # on the worker's link; None until it is sent
    told: bool = False  # whether the worker's last news counts it
    begun: bool = False  # its prompt is here

    def counts(self) -> tuple[int, int, int, int]:
        """Queued tokens, queued requests, tokens on their way, streams, as the worker would count them now."""
        reads = 0 if self.begun else self.reads
        pulls = 0 if self.begun or self.number is None else self.pulls
        return reads, int(reads > 0), pulls, int(self.writes)


def charges(plan: Plan, prompt: int, answer: int) -> tuple[Charge, Charge | None]:
    """What a plan's decode leg and its prefill leg, if it has one, add to their workers, by the plan's prediction.

    Args:
        prompt: tokens of the prompt.
        answer: most tokens of the answer.
    """
    uncached, pulled = prompt, prompt
    if plan.predicted is not None:
        uncached, pulled = plan.predicted.uncached_tokens, plan.predicted.pulled_tokens
    if isinstance(plan, Disaggregated):
        return Charge(prompt + answer, pulls=pulled, writes=True), Charge(prompt, reads=uncached)
    return Charge(prompt + answer, reads=uncached, writes=True), None


class Account:
    """One worker's load as this front end sees it."""

    def __init__(self, facts: EngineFacts) -> None:
        self.requests = self.tokens = 0  # of this front end alone
        self._facts = facts
        self._load: Load | None = None
        self._charges: set[Charge] = set()
        self._more = [0, 0, 0, 0]  # what is here beyond the last news, in the order of `Charge.counts`
        self._ahead_tokens = 0  # tokens of charges that are not in the last news

    def news(self, news: News) -> None:
        """Take the worker's figures, which count its first `news.legs` legs of this front end."""
        self._load = news.load
        self._more = [0, 0, 0, 0]
        self._ahead_tokens = 0
        for charge in self._charges:
            charge.told = charge.number is not None and charge.number <= news.legs
            if not charge.told:
                self._add(charge.counts())
                self._ahead_tokens += charge.tokens

    def open(self, charge: Charge) -> None:
        """A leg is planned."""
        self._charges.add(charge)
        self.requests += 1
        self.tokens += charge.tokens
        self._ahead_tokens += charge.tokens
        self._add(charge.counts())

    def sent(self, charge: Charge, number: int) -> None:
        """A leg is on its way to the worker."""
        self._change(charge, number=number)

    def begun(self, charge: Charge) -> None:
        """A leg's prompt has been read, or its blocks were fetched: its first output is here."""
        self._change(charge, begun=True)

    def close(self, charge: Charge) -> None:
        """A leg is over."""
        self._charges.discard(charge)
        self.requests -= 1
        self.tokens -= charge.tokens
        if not charge.told:
            self._ahead_tokens -= charge.tokens
        self._add(charge.counts(), -1)

    def view(self) -> WorkerView:
        """As a policy sees the worker."""
        facts, load = self._facts, self._load
        if load is None:
            return WorkerView(facts.engine_id, self.requests, self.tokens, block_tokens=facts.block_tokens)
        queued, requests, pulling, streams = self._more
        free = load.free_blocks
        return WorkerView(
            facts.engine_id,
            self.requests,
            self.tokens,
            queued_tokens=max(0, load.queued_tokens + queued),
            queued_requests=max(0, load.queued_requests + requests),
            streams=max(0, load.streams + streams),
            pulling_tokens=max(0, load.pulling_tokens + pulling),
            free_blocks=None if free is None else max(0, free - -(-self._ahead_tokens // facts.block_tokens)),
            block_tokens=facts.block_tokens,
            max_streams=facts.max_streams,
            max_step_tokens=facts.max_step_tokens,
            prefill=Cost(*load.prefill) if load.prefill else None,
            step=Cost(*load.step) if load.step else None,
            pull=Cost(*load.pull) if load.pull else None,
        )

    def _change(self, charge: Charge, *, number: int | None = None, begun: bool | None = None) -> None:
        self._add(charge.counts(), -1)
        charge.number = charge.number if number is None else number
        charge.begun = charge.begun if begun is None else begun
        self._add(charge.counts())

    def _add(self, counts: tuple[int, int, int, int], times: int = 1) -> None:
        self._more = [value + times * count for value, count in zip(self._more, counts, strict=True)]
