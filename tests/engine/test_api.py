"""Everything that vLLM's front end offers for text works through both pools, with the official clients."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pytest

from tests.conftest import MODEL, Server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """The OpenAI client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


GREEDY = {"temperature": 0}


def ask(content: str) -> Any:
    return [{"role": "user", "content": content}]


def test_chat_answers(client: openai.OpenAI) -> None:
    """The demo model knows the capital of France."""
    answer = client.chat.completions.create(model=MODEL, messages=ask("What is the capital of France?"), temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_chat_streams_with_usage(client: openai.OpenAI) -> None:
    """Chunks add up to the whole answer, and the last one carries the usage."""
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ask("What is the capital of France?"),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The capital of France is Paris."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_several_choices(client: openai.OpenAI) -> None:
    """`n=3` gives three choices, each with a handoff of its own."""
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", n=3, max_tokens=8, temperature=1.0)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert all(choice.text for choice in answer.choices)


def test_logprobs(client: openai.OpenAI) -> None:
    """Each token of the answer has its logprob and alternatives, the first one included."""
    answer = client.chat.completions.create(
        model=MODEL, messages=ask("Say hello."), max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 4
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens)


def test_prompt_logprobs_run_whole(server: Server) -> None:
    """Prompt logprobs can't be had from pulled blocks: such a request runs on a decode worker."""
    answer = server.complete("The capital of France is", max_tokens=1, prompt_logprobs=1)
    logprobs = answer["choices"][0]["prompt_logprobs"]
    assert len(logprobs) == answer["usage"]["prompt_tokens"]
    assert logprobs[0] is None and all(logprobs[1:])


def test_stop_strings_and_token_ids(server: Server) -> None:
    """Text ends before a stop string; a stop token ends it, too."""
    whole = server.chat("What is the capital of France?", temperature=0)["choices"][0]["message"]["content"]
    cut = server.chat("What is the capital of France?", temperature=0, stop=[" is"])["choices"][0]
    assert cut["message"]["content"] == whole.split(" is")[0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", " is")
    ids = server.post("/tokenize", {"model": MODEL, "prompt": " is"}).json()["tokens"]
    by_id = server.chat("What is the capital of France?", temperature=0, stop_token_ids=ids)["choices"][0]
    assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", ids[0])


def test_seed_repeats(server: Server) -> None:
    """The same seed gives the same text, another one another."""
    texts = [
        server.complete("Once upon a time", max_tokens=16, temperature=1.0, seed=seed)["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_penalties_change_the_text(server: Server) -> None:
    """A repetition that greedy decoding falls into is broken by the penalties."""
    plain = server.complete("a a a a a a a a", max_tokens=16, temperature=0)["choices"][0]["text"]
    penalized = server.complete("a a a a a a a a", max_tokens=16, temperature=0, repetition_penalty=2.0)
    assert plain != penalized["choices"][0]["text"]


def test_logit_bias_and_min_tokens(server: Server) -> None:
    """A bias forces a token; min_tokens holds back the end."""
    token = server.post("/tokenize", {"model": MODEL, "prompt": "hello"}).json()["tokens"][0]
    biased = server.complete("x", max_tokens=3, temperature=0, logit_bias={str(token): 100})
    assert biased["choices"][0]["text"] == "hello" * 3
    long = server.chat("What is the capital of France?", temperature=0, min_tokens=20, max_tokens=24)
    assert long["usage"]["completion_tokens"] >= 20


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def test_json_schema(client: openai.OpenAI) -> None:
    """The answer parses and has the schema's keys."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ask("Describe Paris."),
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        temperature=0,
        max_tokens=80,
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "people"}


def test_regex(server: Server) -> None:
    """The answer matches the expression."""
    answer = server.complete("My phone number is ", structured_outputs={"regex": "[0-9]{3}-[0-9]{4}"}, max_tokens=16)
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", answer["choices"][0]["text"])


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # or vLLM lets the arguments be any JSON
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_call(server: Server, choice: Any) -> None:
    """A tool is called with arguments that fit its schema, named or left to the model."""
    answer = server.chat("Weather in Paris?", tools=[TOOL], tool_choice=choice, max_tokens=64, temperature=0)
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather"
    assert set(json.loads(call["arguments"])) == {"city"}


def test_responses(client: openai.OpenAI) -> None:
    """The responses API."""
    answer = client.responses.create(model=MODEL, input="What is the capital of France?", temperature=0)
    assert "Paris" in answer.output_text


def test_responses_stream(client: openai.OpenAI) -> None:
    """The responses API, streamed."""
    events = list(client.responses.create(model=MODEL, input="Say hi.", max_output_tokens=8, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_messages(server: Server) -> None:
    """Anthropic's messages API, with its own client, whole and streamed."""
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    messages: Any = ask("What is the capital of France?")
    answer = client.messages.create(model=MODEL, max_tokens=20, messages=messages, extra_body=GREEDY)
    assert "Paris" in answer.content[0].text  # type: ignore[union-attr]
    with client.messages.stream(model=MODEL, max_tokens=20, messages=messages, extra_body=GREEDY) as stream:
        assert "Paris" in "".join(stream.text_stream)


def test_small_routes(server: Server, client: openai.OpenAI) -> None:
    """Models, version, health, metrics, the OpenAPI page, tokenize and back."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/health").status_code == 200
    assert server.metric("vllm:time_to_first_token_seconds_count", engine="0", model_name=MODEL) > 0
    assert server.metric("baton_plans_total", plan="disaggregated") > 0
    assert "/v1/chat/completions" in server.client.get("/openapi.json").json()["paths"]
    assert server.client.get("/docs").status_code == 200
    tokens = server.post("/tokenize", {"model": MODEL, "prompt": "hello world"}).json()["tokens"]
    assert server.post("/detokenize", {"model": MODEL, "tokens": tokens}).json()["prompt"] == "hello world"
