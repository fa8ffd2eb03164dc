"""Who may call, and the id every answer carries. Outermost of all, so that nothing gets past it unanswered."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bug

log = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({"/health", "/ready"})
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Asks for the API key, echoes or makes `x-request-id`, and turns a bug into a 500 that names the request."""

    def __init__(
        self, app: ASGIApp, api_keys: tuple[str, ...], observe: Callable[[Scope, int, float], None] | None = None
    ) -> None:
        """`observe` is told the status of every answer and how many seconds it took."""
        self._app, self._observe = app, observe
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        # `send` itself is for what comes after an answer's start, which nobody here looks at.
        scope.setdefault("state", {}).update(request_id=request_id, send=send)
        began, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self._digests and scope["path"] not in OPEN_ROUTES and not self._knows(headers.get("authorization", "")):
            refusal = ApiError(
                401,
                "no API key, or a wrong one: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, tell)
        else:
            try:
                await self._app(scope, receive, tell)
            except Exception:
                log.exception("request %s: %s %s", request_id, scope["method"], scope["path"])
                if not status:
                    await bug(request_id).response()(scope, receive, tell)
        if self._observe is not None:
            self._observe(scope, status or 499, time.perf_counter() - began)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever fits
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
