"""What a simulated engine says: tokens as a pure function of those before, and made-up logprobs."""

from __future__ import annotations

from typing import Any

FIRST_TOKEN = 1000
"""Below this are a tokenizer's control tokens."""

_MASK = (1 << 61) - 1


def fold(seed: int, tokens: list[int]) -> int:
    """A rolling hash over token ids (polynomial, 61 bits)."""
    for token in tokens:
        seed = (seed * 1_000_003 + token + 1) & _MASK
    return seed


def next_token(seed: int, vocabulary: int) -> int:
    """The token that follows those that `seed` is the hash of."""
    return FIRST_TOKEN + (seed >> 13) % (vocabulary - FIRST_TOKEN)


def likeliest(token: int, vocabulary: int, count: int) -> list[int]:
    """The `count` likeliest tokens: the one that was sampled and its neighbours."""
    return [FIRST_TOKEN + (token + i - FIRST_TOKEN) % (vocabulary - FIRST_TOKEN) for i in range(count)]


def logprobs(token: int, others: list[int]) -> Any:
    """Made-up logprobs: of the token, then of `others`, halving each time."""
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    ids = np.array([[token, *others]], dtype=np.int32)
    values = np.array([[-0.7, *(-0.7 * (i + 1) for i in range(len(others)))]], dtype=np.float32)
    return LogprobsLists(ids, values, np.array([1], dtype=np.int32))


def prompt_logprobs(prompt: list[int], others: list[list[int]]) -> Any:
    """Made-up logprobs of the prompt after its first token, as `logprobs`."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    rows = [logprobs(token, likely) for token, likely in zip(prompt, others, strict=True)]
    return LogprobsTensors(
        torch.tensor([row.logprob_token_ids[0].tolist() for row in rows], dtype=torch.int32),
        torch.tensor([row.logprobs[0].tolist() for row in rows]),
        torch.ones(len(rows), dtype=torch.int32),
    )
