"""Every error's answer: `{"error": {"message", "type", "param", "code"}}`."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from dsv3_jax.serving.errors import Overloaded, RequestError, Unavailable
from dsv3_jax.serving.http.logs import REQUEST_ID

LOG = logging.getLogger(__name__)


class UnknownModel(RequestError):
    """A model that is not served (HTTP 404)."""


_TYPES = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "timeout"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "headers_too_large"),
    500: ("server_error", "internal_error"),
    503: ("service_unavailable_error", "unavailable"),
}
"""Status to type and code; others are invalid_request_error without a code."""

_SHOWN = 100
"""Characters of a wrong value that its error repeats."""


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error."""
    kind, usual = _TYPES.get(status, ("invalid_request_error", None))
    error = {"message": message, "type": kind, "param": param, "code": code or usual}
    return msgspec.json.encode({"error": error})


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a response."""
    body = error_body(status, message, param=param, code=code)
    return Response(body, status, headers=headers, media_type="application/json")


def response_to(error: Exception) -> Response:
    """What an exception of a handler answers; one that nobody foresaw goes to the log, and says nothing of itself."""
    if isinstance(error, UnknownModel):
        return error_response(404, str(error), param=error.param, code="model_not_found")
    if isinstance(error, RequestError):
        return error_response(400, str(error), param=error.param)
    if isinstance(error, Overloaded):
        return error_response(429, str(error), headers={"retry-after": str(error.retry_after)})
    if isinstance(error, Unavailable):
        return error_response(503, str(error), headers={"retry-after": str(error.retry_after)})
    LOG.error("a handler failed", exc_info=error)
    return error_response(500, f"The server failed; its log has the reason under {REQUEST_ID.get()}.")


def add_error_handlers(app: FastAPI) -> None:
    """Answers what the framework refuses by itself."""

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if isinstance(error.body, bytes):  # the framework parses nothing else
            return error_response(415, "A body must be JSON; send the header `Content-Type: application/json`.")
        message, param = _explained(error.errors())
        return error_response(400, message, param=param)

    async def refused(request: Request, error: Any) -> Response:
        where = f"{request.method} {ascii(request.url.path)[1:-1][:_SHOWN]}"
        message = {
            400: "The body cannot be read as JSON.",
            404: f"There is no {where}; GET /openapi.json lists all routes.",
            405: f"{where} is not allowed; see the Allow header.",
        }
        return error_response(
            error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers
        )

    app.add_exception_handler(RequestValidationError, invalid)
    for status in range(400, 600):  # which a route or the framework may refuse with
        app.add_exception_handler(status, refused)


def _explained(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(message, param) of the first field at fault: of the ways to read it, the one that came farthest."""
    if errors[0]["type"] == "json_invalid":
        return f"The body is no JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][-1]}.", None
    if len(errors[0]["loc"]) < 2:
        return "The body must be a JSON object.", None
    field = errors[0]["loc"][1]
    error = max((one for one in errors if one["loc"][1:2] == (field,)), key=_progress)
    names = [part for part in error["loc"][1:] if _is_name(part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)[1:]
    rule = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{param} is missing.", param
    return f"{param}={_shown(error['input'])}: {rule[0].lower()}{rule[1:]}.", param


def _progress(error: Mapping[str, Any]) -> tuple[int, bool]:
    return len(error["loc"]), not error["type"].endswith("_type")


def _is_name(part: object) -> bool:
    """Whether a part of a location is a field or a place, not the name of a type that was tried."""
    names = ("str", "int", "float", "bool")
    return isinstance(part, int) or (re.fullmatch(r"[a-z_]+", str(part)) is not None and part not in names)


def _shown(value: object) -> str:
    """A value's beginning, in ASCII."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
