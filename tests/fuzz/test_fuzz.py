"""Whatever a client sends: no 5xx, no engine dies, nothing stays behind. `make fuzz` sends ten thousand bodies.

`BATON_FUZZ_BODIES` and `BATON_FUZZ_SEED` choose the run; a failure names the seed of its body.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis

from tests.conftest import MODEL
from tests.fuzz.bodies import ASK, VALID, mutated
from tests.fuzz.gateway import QUESTION, Gateway

BODIES = int(os.environ.get("BATON_FUZZ_BODIES", "1500"))
EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "40"))
SEED = int(os.environ.get("BATON_FUZZ_SEED", "1"))
AT_A_TIME = 16
pytestmark = pytest.mark.timeout(300 + BODIES + 60 * EXAMPLES)

Request = tuple[str, str, bytes, dict[str, str] | None]
"""Method, path with query, body and headers."""


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """One front end for the module."""
    with Gateway.open() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def schema(gateway: Gateway) -> dict[str, Any]:
    """The front end's OpenAPI schema."""
    answer: dict[str, Any] = json.loads(gateway.run(gateway.send("GET", "/openapi.json", b"")).body)
    return answer


@pytest.fixture(autouse=True)
def nothing_left(gateway: Gateway) -> Iterator[None]:
    """After each test nothing is held, no engine is dead, and an ordinary request is answered as before."""
    question = json.dumps(QUESTION).encode()
    before = json.loads(gateway.run(gateway.send("POST", "/v1/completions", question)).body)["choices"]
    yield
    left = gateway.run(gateway.settled(5))
    assert not left, left
    assert json.loads(gateway.run(gateway.send("POST", "/v1/completions", question)).body)["choices"] == before


def test_the_seeds_are_valid(gateway: Gateway) -> None:
    """What is mutated is accepted as it is, or it would only ever exercise the first check."""
    refused = []
    for path, bodies in VALID.items():
        for number, body in enumerate(bodies):
            sent = json.dumps({"model": QUESTION["model"], **body}).encode()
            answer = gateway.run(gateway.send("POST", path, sent))
            if answer.status != 200:
                refused.append((path, number, answer))
    assert not refused


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 3, "bad_words": ["\ud800"]}),
        ("/v1/chat/completions", {"messages": ASK, "max_tokens": 3, "bad_words": ["\ud800"]}),
        ("/v1/responses", {"input": ASK, "max_output_tokens": 3, "stop_token_ids": [-1]}),
        ("/v1/responses", {"input": ASK, "max_output_tokens": 3, "stop_token_ids": [-1], "stream": True}),
    ],
)
def test_what_fuzzing_found(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    """Parameters that vLLM stumbles over only on their way into the engine: 400, of streams, too."""
    answer = gateway.run(gateway.send("POST", path, json.dumps({"model": MODEL, **body}).encode()))
    assert (answer.status, answer.fault) == (400, ""), answer


def test_a_fault_of_ours(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is a 500 in OpenAI's shape, and is in the log with its cause."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(gateway.front_end.llm.input_processor, "process_inputs", broken)
    body = json.dumps(QUESTION).encode()
    answer = gateway.run(gateway.send("POST", "/v1/completions", body))
    monkeypatch.undo()
    assert (answer.status, answer.fault) == (500, "")
    assert json.loads(answer.body)["error"]["code"] == 500
    assert [record.exc_info for record in caplog.records if "a request to /v1/completions failed" in record.message]
    assert "a fault of ours" in caplog.text


def test_mutated_bodies(gateway: Gateway, schema: dict[str, Any]) -> None:
    """Types, extremes, nesting, unicode, forged parameters, in any combination."""
    paths = sorted(VALID)
    fields = {path: _fields(schema, path) for path in paths}

    def request(number: int) -> Request:
        path = paths[number % len(paths)]
        return "POST", path, mutated(path, fields[path], random.Random(f"{SEED} {number}")), None

    faults, statuses = gateway.run(send_all(gateway, map(request, range(BODIES))))
    print(f"seed {SEED}: {BODIES} bodies, {dict(sorted(statuses.items()))}")
    assert not faults, f"{len(faults)} faults, seed {SEED}:\n" + "\n".join(faults[:40])


def test_what_the_schema_allows(gateway: Gateway, schema: dict[str, Any]) -> None:
    """Schemathesis makes requests of every operation, path and query parameters included, from the OpenAPI schema."""
    operations = [result.ok() for result in schemathesis.openapi.from_dict(schema).get_all_operations()]
    made: list[Request] = []
    for operation in operations:
        run = hypothesis.given(case=operation.as_strategy())(lambda case: made.append(_on_the_wire(case)))
        hypothesis.seed(SEED)(_settings(EXAMPLES)(run))()
    faults, statuses = gateway.run(send_all(gateway, iter(made)))
    print(f"seed {SEED}: {len(made)} requests to {len(operations)} operations, {dict(sorted(statuses.items()))}")
    assert len(operations) > 15
    assert not faults, f"{len(faults)} faults, seed {SEED}:\n" + "\n".join(faults[:40])


async def send_all(gateway: Gateway, made: Iterator[Request]) -> tuple[list[str], Counter[tuple[str, int]]]:
    """Send requests, some at a time; what was the server's fault, and the count of statuses by path."""
    statuses: Counter[tuple[str, int]] = Counter()
    faults: list[str] = []
    numbered = enumerate(made)

    async def client() -> None:
        for number, (method, path, body, headers) in numbered:
            what = f"request {number}, {method} {path} {body[:600]!r}"
            try:
                answer = await gateway.send(method, path, body, headers)
            except TimeoutError as error:
                faults.append(f"{what}: {error}")
                continue
            statuses["/responses/" if "/responses/" in path else path.partition("?")[0], int(answer.status)] += 1
            if answer.server_fault:
                faults.append(f"{what}: {answer.server_fault}")

    await asyncio.gather(*(client() for _ in range(AT_A_TIME)))
    return faults, statuses


def _settings(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def _on_the_wire(case: schemathesis.Case) -> Request:
    """What schemathesis made, as `requests` would send it."""
    request = requests.Request(**case.as_transport_kwargs(base_url="http://baton")).prepare()
    body = request.body.encode() if isinstance(request.body, str) else request.body or b""
    headers = {name: str(value) for name, value in request.headers.items() if name.lower() != "host"}
    return str(request.method), str(request.path_url), body, headers


def _fields(schema: dict[str, Any], path: str) -> list[str]:
    """Names of all fields that an endpoint's body may have."""
    content = schema["paths"][path]["post"].get("requestBody", {}).get("content", {})
    kinds = [body["schema"] for body in content.values()]
    kinds = [kind for body in kinds for kind in body.get("anyOf", [body])]
    names = [kind["$ref"].rsplit("/", 1)[1] for kind in kinds if "$ref" in kind]
    return sorted({field for name in names for field in schema["components"]["schemas"][name]["properties"]})
