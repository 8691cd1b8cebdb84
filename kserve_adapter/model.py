"""KServe's v1 and v2 (open inference) protocols, REST and gRPC, as calls of the OpenAI front end.

The model has no second way to an engine: each prompt becomes one request to `/v1/completions` of the front end in this
process, with the client's own credentials. So keys, limits, refusals and recovery are those of the OpenAI API.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import httpx
from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException
from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import to_http_parameters
from starlette.types import ASGIApp

from kserve_adapter.whole_request import HeedsCancel

INPUT, OUTPUT = "text_input", "text_output"

PARAMETERS = frozenset(
    {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"}
    | {"ignore_eos", "echo", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}
    | {"skip_special_tokens", "truncate_prompt_tokens"}
)
"""What a prompt may be sent with: the sampling parameters of `/v1/completions` that leave one text for one prompt."""

PROTOCOL_PARAMETERS = frozenset(("binary_data_output", "binary_data_size", "content_type"))
"""Parameters of the v2 protocol itself, which say nothing to the model."""

RETURNED = ("retry-after", "www-authenticate", "x-baton-refusal")
"""Headers of a refusal that a REST client gets back."""

GRPC_STATUS = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
"""gRPC's status for each HTTP status of the front end; any other is INTERNAL."""


class NotServed(GrpcException):
    """The front end's answer was an error: the same for a REST client (`status`) and a gRPC client (`status_code`)."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(details=message, status_code=GRPC_STATUS.get(status, StatusCode.INTERNAL))
        self.status = status
        self.headers = dict(headers or {})


class BatonModel(Model):  # type: ignore[misc]  # KServe is untyped
    """The model that KServe serves. Ready means that both pools of its revision can serve, and it is not draining."""

    def __init__(self, name: str) -> None:
        super().__init__(name, return_response_headers=False)
        self._asgi: ASGIApp | None = None
        self._fleet: Any = None
        self._client: httpx.AsyncClient | None = None
        self.draining = False

    def attach(self, asgi: ASGIApp, fleet: Any) -> None:
        """Serve through this front end from now on; `fleet.ready()` says whether both pools can serve."""
        self._asgi, self._fleet = asgi, fleet
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=HeedsCancel(asgi)),
            base_url="http://front-end",
            timeout=httpx.Timeout(None),
        )

    @property
    def asgi(self) -> ASGIApp | None:
        """The front end; None before it has started and once the server drains."""
        return None if self.draining else self._asgi

    async def healthy(self) -> bool:
        """Whether this predictor can serve a request now."""
        return not self.draining and self._fleet is not None and bool(self._fleet.ready())

    def load(self) -> bool:
        """Nothing to load: KServe calls this when the model is not ready, and asking again makes it no readier."""
        return False

    def start(self) -> None:
        """Nothing to start: the server brings the front end up."""

    def stop(self) -> None:
        """KServe's hook for a model that goes."""
        self.draining = True

    def get_input_types(self) -> list[dict[str, Any]]:
        """The tensors of a v2 request."""
        return [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """The tensors of a v2 response."""
        return [{"name": OUTPUT, "datatype": "BYTES", "shape": [-1]}]

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        """Answer a v1 body (`instances`) or a v2 request (`text_input`); all prompts of one are served or none is.

        Raises:
            InvalidInput: what was sent has not the shape of the protocol.
            NotServed: the front end refused a prompt or failed at it.
        """
        # Credentials, the request's id, priority, deadline and tenant go with each prompt.
        sent = {
            name: value for name, value in (headers or {}).items() if name.lower().startswith(("authorization", "x-"))
        }
        if isinstance(payload, InferRequest):
            texts = await self._generate(v2_prompts(payload), sent)
            return v2_response(self.name, payload, texts)
        return {"predictions": await self._generate(v1_prompts(payload), sent)}

    async def _generate(self, requests: list[dict[str, Any]], headers: dict[str, str]) -> list[str]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(request, headers)) for request in requests]
        except* (NotServed, InvalidInput) as problems:
            raise problems.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, request: dict[str, Any], headers: dict[str, str]) -> str:
        if self._client is None or self.draining:
            raise NotServed(503, f"Model with name {self.name} is not ready.")
        body = {"model": self.name, **request}
        response = await self._client.post("/v1/completions", json=body, headers=headers)
        answer = response.json()
        if response.status_code != 200:
            message = str(answer.get("error", {}).get("message", "the front end failed"))
            raise NotServed(response.status_code, message, {k: v for k, v in response.headers.items() if k in RETURNED})
        return str(answer["choices"][0]["text"])


def v1_prompts(body: Any) -> list[dict[str, Any]]:
    """The completion requests of a v1 body: `instances` of strings or of `{"prompt": …, parameters}`.

    Raises:
        InvalidInput: naming the first instance that is wrong.
    """
    instances = body.get("instances") if isinstance(body, dict) else None
    if not isinstance(instances, list) or not instances:
        raise InvalidInput('Expected a JSON object with "instances", a list of strings or of {"prompt": …}')
    common = body.get("parameters") or {}
    if not isinstance(common, dict):
        raise InvalidInput('Expected "parameters" to be an object')
    requests = []
    for number, instance in enumerate(instances):
        own = {"prompt": instance} if isinstance(instance, str) else instance
        if not isinstance(own, dict) or not isinstance(own.get("prompt"), str):
            raise InvalidInput(f'instances[{number}]: expected a string or {{"prompt": …}}')
        parameters = {**common, **own}
        nested = parameters.pop("parameters", {})
        if not isinstance(nested, dict):
            raise InvalidInput(f'instances[{number}]: expected "parameters" to be an object')
        prompt = parameters.pop("prompt")
        requests.append({"prompt": prompt, **_checked({**parameters, **nested}, f"instances[{number}]")})
    return requests


def v2_prompts(request: InferRequest) -> list[dict[str, Any]]:
    """The completion requests of a v2 request: one for each element of the BYTES tensor `text_input`.

    Raises:
        InvalidInput: another tensor, another type, or a text that is not UTF-8.
    """
    names = [tensor.name for tensor in request.inputs]
    if names != [INPUT]:
        raise InvalidInput(f'Expected exactly one input tensor, "{INPUT}", got {names}')
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise InvalidInput(f'Expected "{INPUT}" to be of datatype BYTES, got {tensor.datatype}')
    try:
        values = tensor.as_numpy().ravel().tolist()
        prompts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    except ValueError as error:  # a shape that does not fit its data, or bytes that are no UTF-8
        raise InvalidInput(f'"{INPUT}" can\'t be read: {error}') from error
    if not prompts:
        raise InvalidInput(f'"{INPUT}" is empty')
    if others := [wanted.name for wanted in request.request_outputs or () if wanted.name != OUTPUT]:
        raise InvalidInput(f'There is one output tensor, "{OUTPUT}"; asked for was {others}')
    sent = {**to_http_parameters(request.parameters or {}), **to_http_parameters(tensor.parameters or {})}
    parameters = _checked({key: sent[key] for key in sent if key not in PROTOCOL_PARAMETERS}, INPUT)
    return [{"prompt": prompt, **parameters} for prompt in prompts]


def v2_response(name: str, request: InferRequest, texts: list[str]) -> InferResponse:
    """The texts as the BYTES tensor `text_output`, raw where the client sent raw or asks for it."""
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()),
        model_name=name,
        infer_outputs=[InferOutput(OUTPUT, [len(texts)], "BYTES", data=texts)],
        from_grpc=request.from_grpc,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


def _checked(parameters: dict[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(set(parameters) - PARAMETERS)
    if unknown:
        raise InvalidInput(f"{where}: unknown parameters {unknown}; known are {sorted(PARAMETERS)}")
    return parameters
