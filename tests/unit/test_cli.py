"""What users get wrong on the command line is told in a sentence, with an exit status of its own."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kserve_adapter.canary.command import EXIT, NO_EVIDENCE
from runtime.cli import main


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """The address of one that says the same to everybody."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def page(body: str, status: str = "200 OK") -> bytes:
    """An HTTP response."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


STRANGERS = {
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "cut": page("{}")[:-1],
    "html": page("<html></html>"),
    "list": page("[1]"),
    "other": page('{"status": "ok"}'),
    "alike": page('{"waiting": 1, "latency": 1, "prompt_tokens": 1, "answer": 1, "meaning": "", "candidates": 1}'),
}


@pytest.mark.parametrize("command", [["top", "--once"], ["explain", "--tokens", "5", "--url"]], ids=["top", "explain"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_server_that_is_not_batons(stranger: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Not HTTP, not JSON, not of this shape: status 2, and the address."""
    with server(STRANGERS[stranger]) as url:
        assert main([*command, url]) == 2
    told = capsys.readouterr().err
    assert told.startswith("baton: no ") and url in told


@pytest.mark.parametrize("body", ["[1]", "<html>"])
def test_a_refusal_that_is_not_batons(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its status is all that can be told of it."""
    with server(page(body, "404 Not Found")) as url:
        assert main(["explain", "--tokens", "5", "--url", url]) == 1
    assert "the server answers 404" in capsys.readouterr().err


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Also without a scheme."""
    assert main(["top", "--once", "somewhere"]) == 2
    assert "somewhere" in capsys.readouterr().err


CANARY = ["canary", "judge", "--name", "m", "--stable", "a", "--canary", "b", "--prometheus"]


@pytest.mark.parametrize("url", ["http://[", "nowhere", "http://127.0.0.1:1"])
def test_a_canary_without_evidence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A status that is no verdict, no misuse (2) and no fault of ours (1)."""
    assert main([*CANARY, url]) == NO_EVIDENCE
    assert NO_EVIDENCE not in {*EXIT.values(), 1, 2}
    assert capsys.readouterr().err.startswith("baton: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([*CANARY, "http://p", "--step-s", "0"], "--step-s: 0 is not at least 1"),
        ([*CANARY, "http://p", "--speed-margin", "1"], "--speed-margin: 1 is not at least 0 and less than 1"),
        ([*CANARY, "http://p", "--alpha", "0"], "--alpha: 0 is not more than 0 and less than 1"),
        ([*CANARY, "http://p", "--beta", "nan"], "--beta: nan is not"),
        ([*CANARY, "http://p", "--latency-margin", "inf"], "--latency-margin: inf is not"),
        ([*CANARY, "http://p", "--minutes", "-5"], "--minutes: -5 is not more than 0"),
        ([*CANARY, "http://p", "--min-requests", "1.5"], "--min-requests: '1.5' is no whole number"),
        (["top", "--every", "0"], "--every: 0 is not more than 0"),
        (["explain", "--url", "http://h", "--tokens", "-1"], "--tokens: -1 is not at least 0"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_numbers_have_bounds(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong one is told by its option, with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
