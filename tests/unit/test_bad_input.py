"""Which exceptions are the client's fault."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel, model_validator

from runtime.bad_input import answer_bad_input


class Body(BaseModel):
    """A body whose check stumbles over what is no object."""

    value: Any = None

    @model_validator(mode="before")
    @classmethod
    def look_inside(cls, data: Any) -> Any:
        """As some of vLLM's do."""
        data["value"].get("x")
        return data


@pytest.fixture
def app() -> FastAPI:
    """An app with a checked body and a route with a fault of its own."""
    app = FastAPI()

    @app.post("/checked")
    async def checked(body: Body) -> str:
        return "fine"

    @app.post("/raw")
    async def raw(request: Request) -> str:
        return str(await request.json())

    @app.post("/faulty")
    async def faulty() -> str:
        return {}["missing"]

    app.middleware_stack = app.build_middleware_stack()  # as vLLM leaves its app
    answer_bad_input(app)
    return app


async def post(app: FastAPI, path: str, body: bytes) -> httpx.Response:
    """POST to the app; an exception that it lets through is a 500."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        return await client.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/checked", b'{"value": {"x": 1}}', 200),
        ("/checked", b'{"value": 5}', 400),  # AttributeError in the validator
        ("/checked", b"{}", 400),  # KeyError in the validator
        ("/raw", b'{"value": ' + b"[" * 100_000, 400),  # RecursionError in the JSON decoder
    ],
    ids=["fine", "attribute", "key", "recursion"],
)
async def test_a_body_that_its_checks_stumble_over(app: FastAPI, path: str, body: bytes, status: int) -> None:
    """The client is told that its body is malformed."""
    answer = await post(app, path, body)
    assert answer.status_code == status
    assert status == 200 or "malformed" in answer.json()["error"]["message"]


async def test_a_fault_of_ours_stays_one(app: FastAPI) -> None:
    """The same exception outside of the checks is a 500."""
    assert (await post(app, "/faulty", b"{}")).status_code == 500
