"""GET /health (does the engine's loop go round?), /ready (would a request be taken?) and /version"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from .errors import unavailable
from .service import Service

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    service = Service.of(request)
    client, age = service.client, check_heartbeat(service)
    if math.isfinite(age):
        return JSONResponse({"status": "ok", "heartbeat_age": round(age, 3)})
    if client.state == "starting" and client.catalog is None:
        return JSONResponse({"status": "starting", "heartbeat_age": None})
    raise unavailable(client.cause or "no engine is connected")


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    service = Service.of(request)
    client = service.client
    if client.state != "ready" or client.catalog is None:
        raise unavailable(client.cause or "the engine is starting")
    check_heartbeat(service)
    return JSONResponse({"status": "ready", "models": [card.name for card in client.catalog.models]})


def check_heartbeat(service: Service) -> float:
    """Seconds since the connected engine's loop came round, infinite without one. Raises ApiError 503: it hangs."""
    age, limit = service.client.heartbeat_age(), service.options.heartbeat_seconds
    if math.isfinite(age) and age > limit:
        raise unavailable(f"the engine's last heartbeat was {age:.1f} s ago; it may be {limit:g} s")
    return age


@router.get("/version")
async def show_version() -> JSONResponse:
    return JSONResponse({"version": installed_version()})


def installed_version() -> str:
    try:
        return version("tandem")
    except PackageNotFoundError:
        return "unknown"
