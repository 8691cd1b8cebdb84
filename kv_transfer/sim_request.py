"""A request in a simulated engine: the blocks that it needs, how far it is read, and what it answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from kv_transfer.handoff import kv_params
from kv_transfer.sim_cache import BlockKey, block_keys
from kv_transfer.sim_text import fold, likeliest, logprobs, next_token, prompt_logprobs


@dataclass(eq=False)
class SimRequest:
    """A request from its arrival until its blocks are free."""

    request: EngineCoreRequest
    params: dict[str, Any]  # KV transfer parameters
    keys: list[int]  # content keys of the prompt's full blocks
    seed: int  # rolling hash of all tokens so far
    held: list[BlockKey] = field(default_factory=list)
    cached: int = 0  # prompt tokens found in this engine's cache
    pulled: int = 0  # prompt tokens that came from a prefill engine
    read: int = 0  # prompt tokens whose KV is here
    made: int = 0  # tokens of the answer
    fetch: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, request: EngineCoreRequest, block_tokens: int) -> SimRequest:
        """`request` as it comes to an engine with blocks of so many tokens."""
        prompt = request.prompt_token_ids or []
        salt = (request.cache_salt, request.lora_request.lora_name if request.lora_request else None)
        return cls(request, kv_params(request), block_keys(prompt, block_tokens, salt), fold(0, prompt))

    @property
    def id(self) -> str:
        """The front end's id of the leg."""
        return self.request.request_id

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return self.request.prompt_token_ids or []

    @property
    def is_read(self) -> bool:
        """Whether the KV of the whole prompt is here, so that the answer can be written."""
        return self.read >= len(self.prompt)

    @property
    def is_pull(self) -> bool:
        """Whether a prefill engine has its blocks."""
        return bool(self.params.get("do_remote_prefill"))

    @property
    def hands_over(self) -> bool:
        """Whether a decode engine will pull its blocks."""
        return bool(self.params.get("do_remote_decode"))

    @property
    def max_tokens(self) -> int:
        """The longest answer that it asks for."""
        sampling = self.request.sampling_params
        return (sampling.max_tokens if sampling else 1) or 1

    def blocks(self, block_tokens: int, window_tokens: int) -> list[BlockKey]:
        """Keys of all blocks that it needs: the prompt's full ones by their content, the others its own.

        Those for the answer are among them: a simulated engine makes requests wait and never preempts.
        """
        tail = max(0, -(-len(self.prompt) // block_tokens) - len(self.keys))
        answer = -(-min(self.max_tokens, window_tokens - len(self.prompt)) // block_tokens)
        return [*self.keys, *((self.id, i) for i in range(tail + answer))]

    def write(self, vocabulary: int, window_tokens: int) -> EngineCoreOutput:
        """The next token of the answer, and its end if this is the last."""
        token = next_token(self.seed, vocabulary)
        self.seed = fold(self.seed, [token])
        self.made += 1
        output = EngineCoreOutput(request_id=self.id, new_token_ids=[token])
        if self.made == 1:
            output.prefill_stats = PrefillStats()
            output.prefill_stats.set(len(self.prompt), self.cached, self.pulled)
        self._end(output, token, window_tokens)
        self._add_logprobs(output, token, vocabulary)
        return output

    def error(self) -> EngineCoreOutput:
        """Its end when the engine can't run it."""
        return EngineCoreOutput(self.id, [], finish_reason=FinishReason.ERROR)

    def _end(self, output: EngineCoreOutput, token: int, window_tokens: int) -> None:
        sampling = self.request.sampling_params
        if sampling and token in (sampling.stop_token_ids or ()) and self.made > (sampling.min_tokens or 0):
            output.finish_reason, output.stop_reason = FinishReason.STOP, token
        elif self.made >= self.max_tokens or len(self.prompt) + self.made >= window_tokens:
            output.finish_reason = FinishReason.LENGTH

    def _add_logprobs(self, output: EngineCoreOutput, token: int, vocabulary: int) -> None:
        sampling = self.request.sampling_params
        if sampling is None:
            return
        if sampling.logprobs is not None:
            wanted = sampling.logprob_token_ids or likeliest(token, vocabulary, sampling.logprobs)
            output.new_logprobs = logprobs(token, wanted)
        if self.made == 1 and sampling.prompt_logprobs is not None and len(self.prompt) > 1:
            others = [likeliest(told, vocabulary, sampling.prompt_logprobs) for told in self.prompt[1:]]
            output.new_prompt_logprobs_tensors = prompt_logprobs(self.prompt[1:], others)
