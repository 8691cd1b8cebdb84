"""A model without weights and tokenizer, and what simulated engines say with it."""

from __future__ import annotations

from pathlib import Path

from kv_transfer.sim_text import fold, next_token

VOCABULARY = 20_000


def answer(prompt: list[int], tokens: int) -> list[int]:
    """What an undisturbed simulated engine says."""
    seed, made = fold(0, prompt), []
    for _ in range(tokens):
        made.append(next_token(seed, VOCABULARY))
        seed = fold(seed, made[-1:])
    return made


def bare_model(folder: Path) -> Path:
    """`folder` as the directory of a model without weights and tokenizer."""
    (folder / "config.json").write_text(f'{{"vocab_size": {VOCABULARY}, "max_position_embeddings": 8192}}')
    return folder
