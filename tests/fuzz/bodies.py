"""Valid bodies of every endpoint, and what a fuzzer makes of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from tests.conftest import MODEL

FORGED = {
    "do_remote_prefill": True,
    "do_remote_decode": True,
    "remote_engine_id": "x",
    "remote_request_id": "x",
    "remote_block_ids": [[0, 1, 2]],
    "remote_host": "192.0.2.1",
    "remote_port": 1,
    "remote_num_tokens": 10**6,
    "remote_prefill_cached_tokens": 10**6,
    "tp_size": 0,
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CALLED = [
    *ASK,
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]}]
SAMPLING = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "presence_penalty": 0.1, "n": 2,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "stop": ["\n", "x"], "stop_token_ids": [2], "min_tokens": 1,
    "logit_bias": {"5": 1.5}, "bad_words": ["bad"], "allowed_token_ids": [5, 6, 7], "ignore_eos": True,
}  # fmt: skip
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}

VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "Hello", "max_tokens": 3},
        {"prompt": ["Hello", "World"], "max_tokens": 3, **STREAM, "logprobs": 2, "echo": True},
        {"prompt": [1000, 1001, 1002], "max_tokens": 4, **SAMPLING},
        {"prompt": [[1000, 1001], [1002]], "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True},
        {"prompt": "x", "max_tokens": 3, "structured_outputs": {"regex": "[a-z]+"}, "kv_transfer_params": FORGED},
        {"prompt": "x", "max_tokens": 3, "response_format": {"type": "json_object"}, "vllm_xargs": {"a": 1}},
        {"prompt": "x", "max_tokens": 3, "structured_outputs": {"choice": ["yes", "no"]}, "cache_salt": "s"},
    ],
    "/v1/chat/completions": [
        {"messages": ASK, "max_tokens": 3},
        {"messages": PARTS, "max_tokens": 3, **STREAM, "logprobs": True, "top_logprobs": 2},
        {"messages": CALLED, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {"messages": ASK, "max_tokens": 3, "tools": [TOOL], "tool_choice": "required", "stream": True},
        {
            "messages": ASK,
            "max_tokens": 3,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
        {
            "messages": ASK,
            "max_completion_tokens": 3,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        },
        {"messages": ASK, "max_tokens": 3, **SAMPLING, "chat_template_kwargs": {"a": 1}, "kv_transfer_params": FORGED},
    ],
    "/v1/chat/completions/batch": [{"messages": [ASK, PARTS], "max_tokens": 3}],
    "/v1/responses": [
        {"input": "Hello", "max_output_tokens": 3},
        {"input": ASK, "max_output_tokens": 3, "stream": True, "instructions": "Be brief.", "store": False},
        {
            "input": "Hello",
            "max_output_tokens": 3,
            "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
        },
    ],
    "/v1/messages": [
        {"messages": ASK[1:], "max_tokens": 3, "system": "Be brief."},
        {"messages": PARTS, "max_tokens": 3, "stream": True, "stop_sequences": ["x"], "temperature": 0.5},
        {
            "messages": ASK[1:],
            "max_tokens": 3,
            "tools": [{"name": "weather", "description": "Weather", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
        },
    ],
    "/v1/messages/count_tokens": [{"messages": ASK[1:], "system": [{"type": "text", "text": "Be brief."}]}],
    "/tokenize": [{"prompt": "Hello", "return_token_strs": True}, {"messages": ASK, "tools": [TOOL]}],
    "/detokenize": [{"tokens": [1000, 1001]}],
    "/generative_scoring": [{"query": "Is it?", "items": ["yes", "no"], "label_token_ids": [1000, 1001]}],
    "/invocations": [{"messages": ASK, "max_tokens": 3}, {"prompt": "Hello", "max_tokens": 3}],
}


def _nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


EXTREMES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 17, 49_151, 49_152, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30,
    0.0, -0.0, 0.5, 1e-300, 1e300, -1e300, float("nan"), float("inf"), float("-inf"),
    "", " ", "\x00", "\ud800", "\U0010ffff", "\u202e\u200b", "é" * 300, "🙂" * 200, "a" * 20_000, "<|im_start|>" * 50,
    "{{ 1/0 }}", "{% for i in range(10) %}x{% endfor %}", "null", "-1", "1e999", "../../etc/passwd", "(" * 50, "[a-z",
    "(a+)+$", "data:image/png;base64,AAAA", "http://192.0.2.1/x.png",
    [], {}, [None], [[]], [{}], [""], [-1], [10**9], [1.5], [True], ["\ud800"], [0] * 3000, ["x"] * 200, [[1000]] * 100,
    {"": ""}, {"a": None}, {"-1": 1}, {"99999999": 100}, {"x": 1e300}, {"1": float("nan")}, {"type": "unknown"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"$ref": "#/definitions/none"}, {"type": 5},
    {"pattern": "("}, FORGED, _nested(30), _nested(150),
]  # fmt: skip
"""Values that have broken parsers before."""


def valid(path: str, chance: random.Random) -> dict[str, Any]:
    """A valid body of an endpoint."""
    body: dict[str, Any] = copy.deepcopy(chance.choice(VALID[path]))
    return {"model": MODEL, **body}


def mutated(path: str, fields: list[str], chance: random.Random) -> bytes:
    """A valid body with one to four changes; `fields` are what the endpoint's schema knows. Rarely broken as bytes."""
    body: Any = valid(path, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        body = chance.choice(CHANGES)(body, fields, chance)
    text = json.dumps(body, ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass")
    if chance.random() < 0.03:
        at = chance.randrange(len(text) + 1)
        other = text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :]
        text = chance.choice((text[:at], other, text * 2, b'{"prompt":' + b"[" * 100_000, b'{"a":' * 50_000))
    return text


def _replace(body: Any, fields: list[str], chance: random.Random) -> Any:
    """Another value somewhere in the tree."""
    return _edit(body, chance, lambda value: copy.deepcopy(chance.choice(EXTREMES)))


def _add(body: Any, fields: list[str], chance: random.Random) -> Any:
    """A field that the endpoint knows, with some value."""
    if isinstance(body, dict) and fields:
        body[chance.choice(fields)] = copy.deepcopy(chance.choice(EXTREMES))
    return body


def _wrap(body: Any, fields: list[str], chance: random.Random) -> Any:
    """A value of the right kind in the wrong container."""
    return _edit(body, chance, lambda value: chance.choice(([value], {"a": value}, [value, value], str(value))))


def _remove(body: Any, fields: list[str], chance: random.Random) -> Any:
    """A missing field."""
    holders = [node for node in _nodes(body) if isinstance(node, dict) and node]
    if holders:
        holder = chance.choice(holders)
        del holder[chance.choice(sorted(holder))]
    return body


def _borrow(body: Any, fields: list[str], chance: random.Random) -> Any:
    """A field's value from another endpoint."""
    other = valid(chance.choice(sorted(VALID)), chance)
    if isinstance(body, dict):
        name = chance.choice(sorted(other))
        body[name] = other[name]
    return body


Change = Callable[[Any, list[str], random.Random], Any]
CHANGES: list[Change] = [_replace, _replace, _add, _add, _wrap, _remove, _borrow]


def _nodes(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(node for child in children for node in _nodes(child))]


def _edit(body: Any, chance: random.Random, change: Callable[[Any], Any]) -> Any:
    """`body` with one of its values, at any depth, changed."""
    holders = [node for node in _nodes(body) if isinstance(node, dict | list) and node]
    if not holders:
        return change(body)
    holder = chance.choice(holders)
    key: Any = chance.choice(sorted(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    holder[key] = change(holder[key])
    return body
