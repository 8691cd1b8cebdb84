"""The three protocols of a predictor, by the clients that people use: KServe's own (REST and gRPC) and OpenAI's."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.streams import CANDIDATES
from tests.conftest import MODEL, wait_for
from tests.kserve.conftest import KEY, Predictor
from tests.pools import ROLES

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the predictor

AUTH = {"authorization": f"Bearer {KEY}"}

ONE, TWO = CANDIDATES[:2]
"""Prompts that go on by themselves: a real engine's texts agree however the two are batched."""


def completion(embedded: Predictor, prompt: str, **params: Any) -> str:
    """What the OpenAI API says: the reference for the other protocols."""
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, **params}
    response = embedded.client.post("/openai/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def v2_request(*prompts: str, raw: bool = False, **parameters: Any) -> InferRequest:
    """A v2 request; `raw` sends the tensor as bytes behind the JSON."""
    tensor = InferInput("text_input", [len(prompts)], "BYTES", data=list(prompts))
    if raw:
        tensor.set_data_from_numpy(np.array([p.encode() for p in prompts], dtype=np.object_), binary_data=True)
    return InferRequest(MODEL, [tensor], request_id="abc", parameters=parameters)


async def test_v1_by_kserves_client(embedded: Predictor) -> None:
    """`:predict` gives the OpenAI API's own texts, in order."""
    expected = [completion(embedded, ONE, max_tokens=8), completion(embedded, TWO, max_tokens=4)]
    one = {"prompt": ONE, "max_tokens": 8}
    data = {"instances": [one, {"prompt": TWO, "max_tokens": 4}], "parameters": {"temperature": 0}}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        answer = await client.infer(embedded.url, data, model_name=MODEL, headers=AUTH)
    assert answer == {"predictions": expected}


@pytest.mark.parametrize("raw", [False, True])
async def test_v2_by_kserves_client(embedded: Predictor, raw: bool) -> None:
    """`infer` with JSON and with raw tensors; the id comes back."""
    expected = [completion(embedded, text, max_tokens=6) for text in (ONE, TWO)]
    request = v2_request(ONE, TWO, raw=raw, max_tokens=6, temperature=0, binary_data_output=raw)
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(embedded.url) and await client.is_server_ready(embedded.url)
        assert await client.is_model_ready(embedded.url, MODEL)
        answer = await client.infer(embedded.url, request, model_name=MODEL, headers=AUTH)
    assert answer.id == "abc" and answer.model_name == MODEL
    values = answer.outputs[0].as_numpy().ravel().tolist()
    assert [value.decode() if isinstance(value, bytes) else value for value in values] == expected


@pytest.mark.parametrize("raw", [False, True])
async def test_grpc_by_kserves_client(embedded: Predictor, raw: bool) -> None:
    """gRPC: live, ready, and the same texts; numbers may come as strings, since the protocol has no floats."""
    expected = completion(embedded, ONE, max_tokens=6)
    request = v2_request(ONE, raw=raw, max_tokens=6, temperature="0")
    async with InferenceGRPCClient(f"127.0.0.1:{embedded.grpc_port}") as client:
        assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready(MODEL)
        answer = await client.infer(request, headers=list(AUTH.items()))
    assert [value.decode() for value in answer.outputs[0].as_numpy().ravel().tolist()] == [expected]


@pytest.mark.parametrize(
    ("headers", "request_", "code"),
    [
        ({}, v2_request("x"), grpc.StatusCode.UNAUTHENTICATED),
        (AUTH, v2_request("x", n=2), grpc.StatusCode.INVALID_ARGUMENT),
        (AUTH, v2_request("x", temperature="-1"), grpc.StatusCode.INVALID_ARGUMENT),
        (AUTH, InferRequest("other", v2_request("x").inputs), grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_grpc_errors(embedded: Predictor, headers: Any, request_: InferRequest, code: grpc.StatusCode) -> None:
    """The right status for each kind of mistake, and none without a key."""
    async with InferenceGRPCClient(f"127.0.0.1:{embedded.grpc_port}", retries=0) as client:
        with pytest.raises(grpc.aio.AioRpcError) as problem:
            await client.infer(request_, headers=list(headers.items()))
    assert problem.value.code() == code


@pytest.mark.parametrize("base", ["/openai/v1", "/llm/v1"])
def test_openai_by_its_client(embedded: Predictor, base: str) -> None:
    """Chat, streamed and not, under both prefixes: the same app, the same answer."""
    client = openai.OpenAI(base_url=embedded.url + base, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12}
    whole = client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(parts) == whole and len(parts) > 3
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=embedded.url + base, api_key="wrong", max_retries=0).models.list()


def test_streams_come_token_by_token(embedded: Predictor) -> None:
    """KServe's app and its middlewares hold nothing back."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with embedded.client.stream("POST", "/openai/v1/completions", json=body) as response:
        times = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    assert len(times) > 50
    assert times[len(times) // 2] - times[0] > 0.1 * (times[-1] - times[0]) > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", f"/v1/models/{MODEL}", None, 200),
        ("GET", "/v1/models/other", None, 404),
        ("GET", "/v2", None, 200),
        ("GET", "/v2/health/live", None, 200),
        ("GET", "/v2/health/ready", None, 200),
        ("GET", "/v2/models", None, 200),
        ("GET", f"/v2/models/{MODEL}", None, 200),
        ("GET", f"/v2/models/{MODEL}/ready", None, 200),
        ("GET", "/v2/models/other/ready", None, 404),
        ("GET", "/metrics", None, 200),
        ("GET", "/openai/health", None, 200),
        ("POST", "/v1/models/other:predict", b'{"instances": ["x"]}', 404),
        ("POST", f"/v1/models/{MODEL}:predict", b"{", 400),
        ("POST", f"/v1/models/{MODEL}:predict", b"{}", 400),
        ("POST", f"/v1/models/{MODEL}:predict", b'{"instances": "x"}', 400),
        ("POST", f"/v1/models/{MODEL}:predict", b'{"instances": [{"prompt": "x", "max_tokens": -1}]}', 400),
        ("POST", f"/v1/models/{MODEL}:predict", b'{"instances": ["' + b"x" * 100_000 + b'"]}', 413),
        ("POST", "/v2/models/other/infer", b'{"inputs": []}', 404),
        ("POST", f"/v2/models/{MODEL}/infer", b'{"inputs": []}', 400),
        ("POST", f"/v2/models/{MODEL}/infer", b'{"inputs": 1}', 422),
        ("POST", f"/v2/repository/models/{MODEL}/unload", b"", 400),
        ("POST", "/openai/v1/completions", b'{"model": "other", "prompt": "x"}', 404),
    ],
)
def test_routes(embedded: Predictor, method: str, path: str, body: bytes | None, status: int) -> None:
    """The routes of KServe's own servers, with their statuses for what is wrong."""
    response = embedded.client.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    if status >= 400 and status != 422:
        assert response.json()["error"]


def test_metadata_and_metrics(embedded: Predictor) -> None:
    """v2 says what the tensors are; one scrape has KServe's, vLLM's and Baton's metrics, of front ends and workers."""
    assert embedded.client.get(f"/v2/models/{MODEL}").json()["inputs"][0]["name"] == "text_input"
    assert embedded.client.get("/v2/models").json() == {"models": [MODEL]}
    completion(embedded, "x", max_tokens=2)
    embedded.client.post(f"/v1/models/{MODEL}:predict", json={"instances": ["x"]})
    metrics = embedded.client.get("/metrics").text
    for name in ("request_predict_seconds", "vllm:time_to_first_token_seconds", "baton_plans_total"):
        assert f'{name}_count{{front_end="' in metrics or f'{name}{{front_end="' in metrics, name
    for pool in ROLES:
        assert re.search(rf'^vllm:num_requests_running\{{worker="[^"]+",pool="{pool}"', metrics, re.MULTILINE), pool


def test_cloudevents(embedded: Predictor) -> None:
    """A structured CloudEvent is answered with one."""
    event = {
        "specversion": "1.0",
        "id": "1",
        "source": "test",
        "type": "test",
        "time": "2026-01-01T00:00:00Z",
        "data": {"instances": ["x"]},
    }
    headers = {"Content-Type": "application/cloudevents+json"}
    response = embedded.client.post(f"/v1/models/{MODEL}:predict", content=json.dumps(event), headers=headers)
    assert response.status_code == 200, response.text
    assert len(response.json()["data"]["predictions"]) == 1


@pytest.mark.parametrize("path", [f"/v1/models/{MODEL}:predict", f"/v2/models/{MODEL}/infer", "/openai/v1/models"])
def test_without_a_key_nothing(embedded: Predictor, path: str) -> None:
    """With keys configured, every way to the model needs one."""
    body = {"instances": ["x"], "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}
    response = httpx.request("GET" if path.endswith("models") else "POST", embedded.url + path, json=body)
    assert response.status_code == 401, response.text


@pytest.mark.parametrize("path", [f"/v1/models/{MODEL}:predict", "/openai/v1/completions"])
def test_a_client_that_leaves_takes_its_work_along(embedded: Predictor, path: str) -> None:
    """KServe's own routes run on when the client is gone; these don't."""
    long = {"prompt": "x", "max_tokens": 6000, "ignore_eos": True}
    body = {"instances": [long]} if "predict" in path else {"model": MODEL, **long}
    before = aborted(embedded)
    with pytest.raises(httpx.ReadTimeout):
        embedded.client.post(path, json=body, timeout=1.5)
    assert wait_for(lambda: aborted(embedded) == before + 1, 20)


def aborted(embedded: Predictor) -> float:
    """Requests that ended because their client had left."""
    families = text_string_to_metric_families(embedded.client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples if sample.name == "baton_requests_total")
    return sum(sample.value for sample in samples if sample.labels["outcome"] == "aborted")
