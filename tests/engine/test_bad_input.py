"""Bad input gets a clear OpenAI-shaped error, and leaves nothing behind (see the `nothing_held` fixture)."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from tests.conftest import MODEL, Server
from tests.fuzz.bodies import FORGED

OK: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}

BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown model", {"model": "other"}, 404, "other"),
    ("negative max_tokens", {"max_tokens": -1}, 400, "max_tokens"),
    ("max_tokens over the window", {"max_tokens": 10**9}, 400, "max_tokens"),
    ("prompt over the window", {"prompt": [1000] * 9000}, 400, "8192"),
    ("empty prompt", {"prompt": []}, 400, ""),
    ("token id out of the vocabulary", {"prompt": [10**7]}, 400, ""),
    ("prompt of a wrong type", {"prompt": {"a": 1}}, 400, "prompt"),
    ("temperature of a wrong type", {"temperature": "hot"}, 400, "temperature"),
    ("temperature below zero", {"temperature": -1}, 400, "temperature"),
    ("n of zero", {"n": 0}, 400, "n"),
    ("too many logprobs", {"logprobs": 10**6}, 400, "logprobs"),
    ("a grammar that is none", {"structured_outputs": {"regex": "("}}, 400, ""),
]


@pytest.mark.parametrize(("change", "status", "word"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_field_is_named(server: Server, change: dict[str, Any], status: int, word: str) -> None:
    """The status is the client's fault, the shape is OpenAI's, and the message names what is wrong."""
    response = server.post("/v1/completions", {**OK, **change})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert word in error["message"]
    assert {"message", "type", "code"} <= set(error)


def test_malformed_json(server: Server) -> None:
    """Not JSON at all."""
    response = server.client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "error" in response.json()


def test_unknown_route(server: Server) -> None:
    """No such page."""
    assert server.client.get("/v1/nothing").status_code == 404


@pytest.mark.parametrize("where", ["kv_transfer_params", "vllm_xargs"])
def test_kv_parameters_of_a_client_go_nowhere(server: Server, where: str) -> None:
    """A client that names a host, an engine and blocks gets an ordinary answer of ordinary length."""
    change = {where: FORGED} if where == "kv_transfer_params" else {where: {"kv_transfer_params": str(FORGED)}}
    answer = server.complete("Hello", max_tokens=3, temperature=0, **change)
    assert answer["choices"][0]["text"] == server.complete("Hello", max_tokens=3, temperature=0)["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer.get("kv_transfer_params") is None


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
def test_a_client_that_leaves_holds_nothing(server: Server, after_s: float) -> None:
    """Disconnects before, during and after the prefill of a long prompt; the fixture checks the blocks."""
    body = {"model": MODEL, "prompt": [2000 + i % 500 for i in range(1200)], "max_tokens": 200, "stream": True}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        closer = threading.Timer(after_s, client.close)
        closer.start()
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                deadline = time.monotonic() + after_s
                for _ in response.iter_raw():
                    if time.monotonic() > deadline:
                        break
        except (httpx.HTTPError, RuntimeError, OSError):
            pass  # the connection was closed under it, as it should be
        finally:
            closer.join()
    assert server.client.get("/health").status_code == 200
