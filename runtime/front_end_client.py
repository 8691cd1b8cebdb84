"""What the commands ask of a running front end: its own routes, over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.request
from typing import Any
from urllib.error import HTTPError

KEY_ENV = "BATON_API_KEY"
"""Where the commands have the API key from."""

_FAULTS = (http.client.HTTPException, OSError, ValueError)


class NoAnswer(Exception):
    """Nobody is there, or somebody who speaks something else than HTTP and JSON; the message says which."""


def ask(url: str, key: str | None, timeout_s: float) -> tuple[int, Any]:
    """The status and the JSON that a GET is answered with; None where a refusal has no JSON.

    Raises:
        NoAnswer: with the reason.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  # the user's own address
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310  # as above
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, _of_refusal(error)
    except _FAULTS as error:
        raise NoAnswer(str(error)) from error


def _of_refusal(error: HTTPError) -> Any:
    with error:
        try:
            return json.load(error)
        except _FAULTS:
            return None
