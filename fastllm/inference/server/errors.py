"""Errors in OpenAI's form."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from ...errors import ParameterError, UserError
from ..async_engine import EngineClosed

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one clear line.
        param: the field that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error. One that nobody expects is told in the log alone."""
    match error:
        case ApiError():
            return error
        case HTTPException():  # the router's
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case ParameterError():
            return ApiError(400, str(error), param=error.name)
        case EngineClosed():
            return shutting_down()
        case UserError():  # the model's: a body that is wrong is a ParameterError
            return ApiError(500, str(error), code="model_error")
        case MemoryError():
            return ApiError(503, "the server is out of memory", code="out_of_memory", headers={"Retry-After": "5"})
    traceback.print_exception(error)
    return ApiError(500, "an internal error; the server's log says more", code="internal_error")
