"""KServe's protocols onto the OpenAI front end: what becomes of a request, and of the front end's answer."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from kserve import InferInput, InferRequest, Model
from kserve.errors import InvalidInput
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from kserve_adapter.model import BatonModel, NotServed, v1_prompts, v2_prompts
from kserve_adapter.whole_request import WholeRequest


class Fleet:
    """Both pools, or not."""

    def __init__(self, ready: bool) -> None:
        self._ready = ready

    def ready(self) -> bool:
        """As the fleet's."""
        return self._ready


def model(answer: Any) -> BatonModel:
    """A model over a front end that answers each completion with `answer(body, headers)`."""

    async def complete(request: Request) -> JSONResponse:
        body, status, headers = answer(await request.json(), request.headers)
        return JSONResponse(body, status, headers)

    made = BatonModel("m")
    made.attach(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])]), Fleet(True))
    return made


def echo(body: dict[str, Any], headers: Any) -> tuple[Any, int, dict[str, str]]:
    """The prompt, the limit and the key that came."""
    text = f"{body['prompt']}/{body.get('max_tokens')}/{headers.get('authorization')}"
    return {"choices": [{"text": text}]}, 200, {}


def v2(data: list[Any], parameters: dict[str, Any] | None = None, **changes: Any) -> InferRequest:
    """A v2 request with one tensor."""
    tensor = {"name": "text_input", "shape": [len(data)], "datatype": "BYTES", "data": data, **changes}
    return InferRequest("m", [InferInput(**tensor)], request_id="7", parameters=parameters)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"instances": ["a"]}, [{"prompt": "a"}]),
        ({"instances": ["a", {"prompt": "b", "max_tokens": 3}]}, [{"prompt": "a"}, {"prompt": "b", "max_tokens": 3}]),
        ({"instances": [{"prompt": "a", "parameters": {"seed": 1}}]}, [{"prompt": "a", "seed": 1}]),
        (
            {"instances": ["a", {"prompt": "b", "seed": 2}], "parameters": {"seed": 1}},
            [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}],
        ),
    ],
)
def test_v1_bodies(body: Any, expected: list[dict[str, Any]]) -> None:
    """Strings and objects; an instance's own parameters go before the common ones."""
    assert v1_prompts(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"text",
        [],
        {},
        {"instances": []},
        {"instances": "a"},
        {"instances": [1]},
        {"instances": [{"prompt": 1}]},
        {"instances": [{"max_tokens": 1}]},
        {"instances": ["a"], "parameters": 1},
        {"instances": [{"prompt": "a", "n": 2}]},
        {"instances": [{"prompt": "a", "stream": True}]},
        {"instances": [{"prompt": "a", "model": "other"}]},
        {"instances": [{"prompt": "a", "kv_transfer_params": {}}]},
    ],
)
def test_v1_bodies_that_are_refused(body: Any) -> None:
    """What has not the protocol's shape, and parameters that would change what a prediction is."""
    with pytest.raises(InvalidInput):
        v1_prompts(body)


def test_v2_tensors() -> None:
    """One request an element; parameters of the protocol stay with the protocol."""
    request = v2([b"a", "b"], {"max_tokens": 2, "binary_data_output": True})
    assert v2_prompts(request) == [{"prompt": "a", "max_tokens": 2}, {"prompt": "b", "max_tokens": 2}]


@pytest.mark.parametrize(
    "request_",
    [
        v2(["a"], name="prompt"),
        v2([1.0], datatype="FP32"),
        v2([b"\xff"]),
        v2([]),
        v2(["a"], shape=[2]),
        v2(["a"], {"n": 2}),
    ],
)
def test_v2_tensors_that_are_refused(request_: InferRequest) -> None:
    """Another name, type or shape, no text, unknown parameters."""
    with pytest.raises(InvalidInput):
        v2_prompts(request_)


async def test_predictions_are_in_order_with_the_clients_key() -> None:
    """v1: each instance's text in its place, asked for with the client's own credentials."""
    body = {"instances": ["a", {"prompt": "b", "max_tokens": 3}]}
    answer = await model(echo).predict(body, {"authorization": "Bearer k", "cookie": "c"})
    assert answer == {"predictions": ["a/None/Bearer k", "b/3/Bearer k"]}


async def test_v2_response() -> None:
    """v2: the id comes back, the texts are in `text_output`."""
    answer, _ = (await model(echo).predict(v2(["a"]), {})).to_rest()
    assert answer["id"] == "7" and answer["model_name"] == "m"
    assert answer["outputs"] == [
        {"name": "text_output", "shape": [1], "datatype": "BYTES", "data": ["a/None/None"]},
    ]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, grpc.StatusCode.UNAUTHENTICATED),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (503, grpc.StatusCode.UNAVAILABLE),
        (500, grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_refusal_is_the_front_ends(status: int, code: grpc.StatusCode) -> None:
    """Status, message and Retry-After of the front end, in both protocols; one refused prompt refuses the request."""

    def refuse(body: dict[str, Any], headers: Any) -> tuple[Any, int, dict[str, str]]:
        if body["prompt"] == "a":
            return echo(body, headers)
        return {"error": {"message": "no"}}, status, {"retry-after": "3"}

    with pytest.raises(NotServed) as problem:
        await model(refuse).predict({"instances": ["a", "b"]})
    assert problem.value.status == status and problem.value.headers == {"retry-after": "3"}
    assert problem.value.status_code == code and problem.value.details == "no"


async def test_ready_is_the_truth() -> None:
    """Not before the front end, not without both pools, not while draining; and being asked makes it no readier."""
    made: Model = BatonModel("m")
    assert not await made.healthy() and not made.load() and not await made.healthy()
    with pytest.raises(NotServed):
        await made.predict({"instances": ["a"]})
    for ready in (False, True):
        made.attach(Starlette(), Fleet(ready))
        assert await made.healthy() is ready
    made.draining = True
    assert not await made.healthy() and made.asgi is None


async def run(app: Any, path: str, chunks: list[bytes], leaves: bool = False) -> list[dict[str, Any]]:
    """What `app` sends to a client that sends `chunks` and then stays or leaves."""
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "path": path, "method": "POST", "headers": []}, receive, send)
    return sent


@pytest.mark.parametrize(("size", "status"), [(10, 200), (11, 413)])
async def test_bodies_are_limited(size: int, status: int) -> None:
    """A body of v1 or v2 over the limit is refused before KServe reads it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        assert len(body) == 10
        await JSONResponse({})(scope, receive, send)

    sent = await run(WholeRequest(app, 10), "/v1/models/m:predict", [b"x" * 5, b"x" * (size - 5)])
    assert sent[0]["status"] == status


async def test_work_ends_with_its_client() -> None:
    """A client that leaves takes its request along."""
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with asyncio.timeout(5):
        assert await run(WholeRequest(app, 10), "/v2/models/m/infer", [b"{}"], leaves=True) == []
    assert ended.is_set()


async def test_a_prediction_that_is_cancelled_ends_its_work() -> None:
    """vLLM's routes run their work in a task of its own, which ends when the client leaves and by nothing else."""
    begun, left = asyncio.Event(), asyncio.Event()

    async def complete(request: Request) -> JSONResponse:
        await request.body()
        begun.set()
        work = asyncio.create_task(asyncio.sleep(60))
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.set()
        work.cancel()
        return JSONResponse(None)

    made = BatonModel("m")
    made.attach(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])]), Fleet(True))
    prediction = asyncio.create_task(made.predict({"instances": ["x"]}))
    await begun.wait()
    prediction.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prediction
    assert left.is_set()
