"""Bodies that vLLM's own checks stumble over: a 400 for the client, where there would be a 500; and faults of ours.

vLLM answers for what its validators refuse, and for `ValueError` and its like. Some validators look into a value before
they know its type, and a deeply nested body exhausts the JSON decoder; what they raise then says nothing of a fault
of ours, because they have seen nothing but the body.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

logger = logging.getLogger("baton.frontend")

STUMBLES = (AttributeError, LookupError, RecursionError, AssertionError, ArithmeticError)
"""What code raises that expected something else. Other exceptions are left to vLLM's handlers."""

CHECKS = (
    ("starlette/requests.py", "json"),
    ("fastapi/_compat/v2.py", "validate"),
    ("openai/responses/utils.py", "_construct_message_from_response_item"),
    ("v1/engine/input_processor.py", "process_inputs"),
)
"""Where the body is decoded, validated, turned into messages and its parameters into an engine's: file and function.
What runs inside of them has only the body to see."""


def answer_bad_input(app: FastAPI) -> None:
    """Have `app` answer 400 when the decoding or validation of a body raises one of `STUMBLES`.

    What else went wrong while an engine was asked is logged, and answered with a 500. vLLM's own handler would stop the
    server for it, and there is none of its own.
    """
    for kind in STUMBLES:
        app.add_exception_handler(kind, _on_stumble)
    for fault in (EngineGenerateError, EngineDeadError):
        app.add_exception_handler(fault, _on_fault)
    app.middleware_stack = None  # vLLM's has been built already; Starlette builds it anew, with these


@contextmanager
def checked_parameters() -> Iterator[None]:
    """Where an engine's parameters are made of a client's: what is raised over them becomes vLLM's own error for that.

    vLLM would wrap it into one that says only that the engine failed.

    Raises:
        VLLMValidationError: the client's parameters can't be what they are.
    """
    try:
        yield
    except VLLMError:
        raise
    except Exception as error:
        if not raised_in_checks(error.__traceback__):
            raise
        raise VLLMValidationError(f"The request is malformed: {error}") from error


async def _on_fault(request: Request, error: Exception) -> Response:
    logger.error("a request to %s failed", request.url.path, exc_info=error.__cause__ or error)
    answer = create_error_response(error)
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)


async def _on_stumble(request: Request, error: Exception) -> Response:
    if not raised_in_checks(error.__traceback__):
        raise error
    logger.info("a body for %s made its checks raise %r", request.url.path, error)
    answer = create_error_response(ValueError(f"The body is malformed: {error}"))
    return JSONResponse(answer.model_dump(), status_code=400)


def raised_in_checks(traceback: TracebackType | None) -> bool:
    """Whether an exception came out of the decoding or validation of a body."""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        file = Path(code.co_filename).as_posix()
        if any(file.endswith(f"/{name}") and code.co_name == function for name, function in CHECKS):
            return True
        traceback = traceback.tb_next
    return False
