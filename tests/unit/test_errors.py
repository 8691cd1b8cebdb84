"""What errors mean to a client."""

from __future__ import annotations

import pytest

from runtime.errors import STATUS, Refusal, anthropic_body, openai_body


@pytest.mark.parametrize("reason", STATUS)
def test_every_refusal_has_a_body_in_both_shapes(reason: str) -> None:
    """Whatever the reason, OpenAI's and Anthropic's clients are told a type and the message."""
    refusal = Refusal(reason, "no")
    for body in (openai_body(refusal), anthropic_body(refusal)):
        error = body["error"]
        assert isinstance(error, dict) and error["type"] and error["message"] == "no"
