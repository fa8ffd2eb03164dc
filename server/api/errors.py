"""Every refusal and failure: a status and `{"error": {"message", "type", "param", "code"}}`, like the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..engine.request import Catalog, EngineError, ErrorKind

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
STATUSES: dict[ErrorKind, int] = {
    "invalid": 400,
    "not_found": 404,
    "conflict": 409,
    "overloaded": 429,
    "deadline": 504,
    "unavailable": 503,
    "internal": 500,
}
RETRY_SECONDS = 1  # said where the engine names no time
ELSEWHERE = {  # routes of other APIs, and what to use here
    "/v1/responses": "use POST /v1/chat/completions",
    "/v1/messages": "use POST /v1/chat/completions",
}


class ApiError(Exception):
    """Ends a request with `status`; `param` names the field at fault."""

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

    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def no_such_model(name: str, catalog: Catalog, param: str = "model") -> ApiError:
    known = ", ".join(sorted(card.name for card in catalog.listed))
    return ApiError(
        404, f"the model {name[:200]!r} is not hosted here; there are: {known}", param=param, code="model_not_found"
    )


def unavailable(cause: str | None) -> ApiError:
    return ApiError(503, cause or "the engine is not ready", code="unavailable", headers=_retry(None))


def of_engine(error: EngineError, request_id: str) -> ApiError:
    status = STATUSES[error.kind]
    if status == 500:
        return bug(request_id, error.message)
    headers = _retry(error.retry_after) if status in (429, 503) else None
    return ApiError(
        status, error.message, param=error.param, code=None if error.kind == "invalid" else error.kind, headers=headers
    )


def bug(request_id: str, what: str = "internal error") -> ApiError:
    return ApiError(500, f"{what} (request {request_id}; the server's log has more)", code="internal")


def _retry(seconds: float | None) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(RETRY_SECONDS if seconds is None else seconds)))}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, message = request.url.path, str(error.detail)
    if error.status_code == 404:
        hint = ELSEWHERE.get(path.rstrip("/"))
        message = f"no such route: {request.method} {path}" + (f"; {hint}" if hint else "")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} takes {allowed}, not {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
