"""LoRA adapters under numbers that all front ends and workers agree on."""

from __future__ import annotations

import hashlib

import msgspec
from vllm.lora.request import LoRARequest


def numbered(adapter: LoRARequest) -> LoRARequest:
    """`adapter` under a number that its name and path make.

    Each vLLM front end counts the adapters that it was told of, and an engine that has a number already loads nothing
    for it: two front ends, or one that started anew, would mean different adapters by the same number.

    Returns:
        A copy with a `lora_int_id` of 31 bits, at least 1 (vLLM keeps them as positive integers).
    """
    digest = hashlib.sha256(f"{adapter.lora_name}\0{adapter.lora_path}".encode(errors="surrogatepass")).digest()
    return msgspec.structs.replace(adapter, lora_int_id=1 + int.from_bytes(digest[:4], "big") % (2**31 - 1))
