"""Who may call, and the id every answer carries. Outermost of all, so that nothing gets past it unanswered."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bug

log = logging.getLogger(__name__)

OPEN_ROUTES = frozenset({"/health", "/ready"})
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Asks for the key, echoes or makes `x-request-id`, and turns a bug into a 500 that names the request.

    An admin key opens every route. The admin routes open to nothing else: without one they are shut where there are API
    keys, and where there are no keys at all they open to callers on this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: tuple[str, ...],
        admin_keys: tuple[str, ...] = (),
        admin_routes: frozenset[tuple[str, str]] = frozenset(),
        observe: Callable[[Scope, int, float], None] | None = None,
    ) -> None:
        """`admin_routes`: method and path of each. `observe` is told the status of every answer and how many seconds it
        took."""
        self._app, self._admin_routes, self._observe = app, admin_routes, observe
        self._digests = [_digest(key) for key in api_keys]
        self._admin_digests = [_digest(key) for key in admin_keys]

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

        refusal = self._refusal(scope, headers.get("authorization", ""))
        try:
            await (refusal.response() if refusal is not None else self._app)(scope, receive, tell)
        except Exception:
            log.exception("request %s: %s %s", request_id, scope["method"], scope["path"])
            if not status:
                await bug(request_id).response()(scope, receive, tell)
        finally:
            del scope["state"]["send"]  # which holds the scope: all of a request would wait for the collector of cycles
        if self._observe is not None:
            self._observe(scope, status or 499, time.perf_counter() - began)

    def _refusal(self, scope: Scope, authorization: str) -> ApiError | None:
        guarded = (scope["method"], scope["path"]) in self._admin_routes
        if guarded and not self._digests and not self._admin_digests:
            if _is_local(scope):
                return None
            message = f"{scope['path']} is for callers on this machine, unless the server is started with --admin-key"
            return ApiError(403, message, code="admin_key_needed")
        if not (self._digests or guarded) or scope["path"] in OPEN_ROUTES:
            return None
        is_admin, is_user = _fits(authorization, self._admin_digests), _fits(authorization, self._digests)
        if is_admin or (is_user and not guarded):
            return None
        if is_user:
            has = "send it" if self._admin_digests else "the server has none: start it with --admin-key"
            return ApiError(403, f"{scope['path']} needs the admin key; {has}", code="admin_key_needed")
        kind = "admin" if guarded and not self._digests else "API"
        return ApiError(
            401,
            f"no {kind} key, or a wrong one: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def routes_of(*routers: APIRouter) -> frozenset[tuple[str, str]]:
    """Method and path of each of their routes."""
    found = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return frozenset((method, route.path) for route in found for method in route.methods or ())


def _fits(authorization: str, digests: list[bytes]) -> bool:
    scheme, _, key = authorization.partition(" ")
    digest = _digest(key.strip())
    matches = [hmac.compare_digest(digest, known) for known in digests]  # all, whichever fits
    return scheme.lower() == "bearer" and any(matches)


def _is_local(scope: Scope) -> bool:
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
