"""Who may call, and the id every answer carries. Outermost of all, so that nothing gets past it unanswered."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bug

log = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({"/health", "/ready"})
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Asks for the API key, echoes or makes `x-request-id`, and turns a bug into a 500 that names the request."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        # `send` itself is for what comes after an answer's start, which nobody here looks at.
        scope.setdefault("state", {}).update(request_id=request_id, send=send)
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self._digests and scope["path"] not in OPEN_ROUTES and not self._knows(headers.get("authorization", "")):
            refusal = ApiError(
                401,
                "no API key, or a wrong one: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refusal.response()(scope, receive, tell)
        try:
            await self._app(scope, receive, tell)
        except Exception:
            log.exception("request %s: %s %s", request_id, scope["method"], scope["path"])
            if not started:
                await bug(request_id).response()(scope, receive, tell)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever fits
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
