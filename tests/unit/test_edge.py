"""What a client meets first: API keys, the limit on the body, and refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message
from vllm.exceptions import VLLMValidationError

from runtime import edge
from runtime.admission_settings import AdmissionSettings
from runtime.edge import Edge
from runtime.errors import TYPES, Refusal
from runtime.visit import Reception, current_visit


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


PATHS = ("/v1/models", "/health", "/metrics", "/tokenize", "/v1/completions")
APP = Starlette(routes=[Route(path, echo, methods=["GET", "POST"]) for path in PATHS])


def client(*keys: str) -> httpx.AsyncClient:
    """A client of the app behind an edge."""
    transport = httpx.ASGITransport(Edge(APP, 1000, keys, Reception(AdmissionSettings())))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/tokenize", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"Authorization": "Basic one"}, 401),
        ("/v1/models", {"Authorization": "Bearer one"}, 200),
        ("/v1/models", {"Authorization": "bearer two"}, 200),
        ("/v1/models", {"x-api-key": "two"}, 200),
        ("/health", {}, 200),
        ("/metrics", {}, 200),
    ],
)
async def test_api_keys(path: str, headers: dict[str, str], status: int) -> None:
    """Every path but probes and metrics needs one of the keys."""
    async with client("one", "two") as http:
        response = await http.get(path, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "unauthorized"


async def test_no_keys_no_questions() -> None:
    """Without configured keys everything is open (on loopback, by default)."""
    async with client() as http:
        assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1001, 413)])
@pytest.mark.parametrize("declared", [True, False])
async def test_body_limit(size: int, status: int, declared: bool) -> None:
    """Too large a body is refused by its declared length, or as soon as too much of it has come."""

    async def chunks() -> object:
        yield b"x" * size

    async with client() as http:
        response = await http.post("/v1/completions", content=b"x" * size if declared else chunks())  # type: ignore[arg-type]
    assert response.status_code == status
    if status == 413:
        assert "1000 bytes" in response.json()["error"]["message"]


async def test_a_waiting_stream_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments while an event stream is silent, none in other answers, and none after the end."""
    monkeypatch.setattr(edge, "KEEP_ALIVE_S", 0.02)

    async def slow() -> AsyncIterator[str]:
        yield "data: a\n\n"
        await asyncio.sleep(0.2)
        yield "data: b\n\n"

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(slow(), media_type=request.query_params["type"])

    app = Edge(Starlette(routes=[Route("/", stream)]), 10, (), Reception(AdmissionSettings()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        events = (await http.get("/", params={"type": "text/event-stream"})).text
        plain = (await http.get("/", params={"type": "text/plain"})).text
    assert plain == "data: a\n\ndata: b\n\n"
    assert events.replace(": waiting\n\n", "") == plain
    assert ": waiting\n\n" in events


# Refusals: the app does as vLLM's, and begins a stream before the engine has seen the request.


@dataclass
class Work:
    """What an app does for a request."""

    admit_after_s: float | None = 0.0
    refuse: Refusal | None = None
    before: str = ""  # sent before the engine has seen the request, as the Responses API does
    text: str = "data: token\n\n"
    ends_with: int = 200

    async def tokens(self) -> AsyncIterator[str]:
        visit = current_visit.get()
        assert visit is not None
        if self.before:
            yield self.before
        await asyncio.sleep(self.admit_after_s or 0.0)
        if self.refuse is not None:
            visit.refuse(self.refuse)
            yield "data: {error}\n\n"
            return
        visit.admitted = True
        yield self.text


class Listener:
    """An ASGI server that notes what is sent, and when."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.status = 0
        self.headers: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "two responses"
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert self.status
        self.sent.append((message["type"], message.get("body", b"")))

    @property
    def body(self) -> bytes:
        return b"".join(body for _, body in self.sent)


async def answer(work: Work, path: str, stream: bool, listener: Listener | None = None) -> Listener:
    """Send a request to an app that does `work`."""

    async def handler(request: Request) -> Response:
        if stream:
            return StreamingResponse(work.tokens(), media_type="text/event-stream")
        text = "".join([part async for part in work.tokens()])
        return JSONResponse({"text": text}, status_code=work.ends_with)

    app = Edge(Starlette(routes=[Route(path, handler, methods=["POST"])]), 1000, (), Reception(AdmissionSettings()))  # type: ignore[call-arg]
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "http_version": "1.1"}
    listener = listener or Listener()
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    await app(scope, receive, listener.send)
    return listener


STREAMED = [True, False]
FULL = Refusal("overloaded", "too much", 2.3)


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize("before", ["", "data: created\n\n"])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (FULL, 429, "3"),
        (Refusal("starting", "s", 0.0), 503, "1"),
        (Refusal("no_workers", "n", 1e9), 503, "3600"),
        (Refusal("deadline", "d"), 504, None),
    ],
    ids=lambda value: value.reason if isinstance(value, Refusal) else None,
)
async def test_a_refusal_is_the_response(
    stream: bool, before: str, refusal: Refusal, status: int, retry_after: str | None
) -> None:
    """Status, Retry-After, typed reason in body and header: also of a stream that the app has begun already."""
    response = await answer(Work(refuse=refusal, before=before), "/v1/completions", stream)
    assert response.status == status
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-baton-refusal"] == refusal.reason
    error = json.loads(response.body)["error"]
    assert error == {"message": refusal.message, "type": TYPES[status], "param": None, "code": refusal.reason}


@pytest.mark.parametrize("stream", STREAMED)
async def test_a_refusal_in_anthropics_shape(stream: bool) -> None:
    """As Anthropic's clients expect it."""
    response = await answer(Work(refuse=FULL), "/v1/messages", stream)
    assert (response.status, response.headers["x-baton-refusal"]) == (429, "overloaded")
    assert json.loads(response.body) == {"type": "error", "error": {"type": "rate_limit_error", "message": "too much"}}


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize("before", ["", "data: created\n\n"])
async def test_who_is_let_in_gets_all(stream: bool, before: str) -> None:
    """Nothing of the response is lost or changes its order, whatever was sent before the verdict."""
    response = await answer(Work(before=before, admit_after_s=0.05), "/v1/completions", stream)
    assert response.status == 200
    text = before + "data: token\n\n"
    assert response.body.decode() == text if stream else json.loads(response.body) == {"text": text}


async def test_no_response_starts_before_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waits says nothing, not even a sign of life: its status is not known yet."""
    monkeypatch.setattr(edge, "KEEP_ALIVE_S", 0.01)
    listener = Listener()
    work = Work(before="data: created\n\n", admit_after_s=0.2)
    running = asyncio.ensure_future(answer(work, "/v1/responses", True, listener))
    await asyncio.sleep(0.1)
    assert listener.sent == []
    await running
    assert listener.status == 200


async def test_a_stream_that_was_let_in_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the verdict the response begins, before there is a token."""
    monkeypatch.setattr(edge, "KEEP_ALIVE_S", 0.02)

    class Slow(Work):
        async def tokens(self) -> AsyncIterator[str]:
            visit = current_visit.get()
            assert visit is not None
            visit.admitted = True
            await asyncio.sleep(0.2)
            visit.refuse(FULL)  # too late
            yield self.text

    response = await answer(Slow(), "/v1/completions", True)
    assert response.status == 200
    assert response.body.replace(b": waiting\n\n", b"") == b"data: token\n\n"
    assert b": waiting\n\n" in response.body


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("This model's maximum context length is 8192 tokens. However, …", "context_length_exceeded"),
        ("temperature must be non-negative", None),
    ],
)
async def test_a_prompt_over_the_window(message: str, code: str | None) -> None:
    """vLLM's own refusal gets its type; other bad input is left as it is."""

    async def handler(request: Request) -> Response:
        return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": 400}}, status_code=400)

    app = Edge(Starlette(routes=[Route("/", handler, methods=["POST"])]), 1000, (), Reception(AdmissionSettings()))  # type: ignore[call-arg]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.post("/")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert response.headers.get("x-baton-refusal") == code
    assert response.json()["error"]["code"] == (code or 400)


async def test_a_wrong_header_is_refused() -> None:
    """Before the app has seen anything."""
    async with client() as http:
        response = await http.get("/v1/models", headers={"x-baton-deadline-ms": "soon"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_header"


async def test_open_requests_are_bounded() -> None:
    """One more than the limit is refused at once; when one has ended there is room again; probes always get through."""
    go_on = asyncio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        await go_on.wait()
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", slow, methods=["POST"]), Route("/health", echo)])
    edge = Edge(app, 1000, (), Reception(AdmissionSettings()), max_requests=2)  # type: ignore[call-arg]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as http:
        first = [asyncio.ensure_future(http.post("/")) for _ in range(2)]
        while edge._open < 2:
            await asyncio.sleep(0)
        refused = await http.post("/")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert (await http.get("/health")).status_code == 200
        go_on.set()
        assert [(await response).text for response in first] == ["done", "done"]
        assert (await http.post("/")).status_code == 200


@pytest.mark.parametrize("stream_began", [False, True])
@pytest.mark.parametrize("error", [ValueError("background may not be null"), VLLMValidationError("no such token")])
async def test_a_body_that_breaks_the_stream_is_refused(*, error: Exception, stream_began: bool) -> None:
    """vLLM may notice that it can't answer only when it makes a stream's first event: no client gets a 500 for that."""

    async def events() -> AsyncIterator[str]:
        if stream_began:
            visit = current_visit.get()
            assert visit is not None
            visit.admitted = True
            yield "data: {}\n\n"
        raise error

    async def respond(request: Request) -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    async def bad(request: Request, error: Exception) -> Response:
        return JSONResponse({}, status_code=400)

    routes = [Route("/v1/responses", respond, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers={type(error): bad})
    transport = httpx.ASGITransport(Edge(app, 1000, (), Reception(AdmissionSettings())))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        if stream_began:
            with pytest.raises(RuntimeError, match="response already started"):  # too late: the connection breaks
                await http.post("/v1/responses", json={})
            return
        response = await http.post("/v1/responses", json={})
    assert (response.status_code, response.headers["x-baton-refusal"]) == (400, "malformed")
    assert str(error) in response.json()["error"]["message"]
