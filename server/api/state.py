"""GET /health (does the engine's loop go round?), /ready (would a request be taken?) and /version"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ..engine.counts import ModelStats
from .errors import unavailable
from .metrics import ENGINE_SECONDS
from .models import shown
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


async def about(service: Service) -> dict[str, Any]:
    """The server's options, and by model what `/v1/models` says and what it does right now."""
    found = await service.client.stats(ENGINE_SECONDS)
    now = {stats.name: stats for stats in found or ()}
    models = [
        {**shown(card), "now": load(now[card.name]) if card.name in now else None} for card in service.catalog().models
    ]
    told = {"version": installed_version(), "state": service.client.state, "models": models}
    return {**told, "options": dict(service.settings)}


def load(stats: ModelStats) -> dict[str, int | bool]:
    names = (
        "running",
        "waiting",
        "paused",
        "page_size",
        "pages",
        "pages_used",
        "pages_cached",
        "pages_available",
        "slabs",
    )
    return {name: getattr(stats, name) for name in names}


def installed_version() -> str:
    try:
        return version("tandem")
    except PackageNotFoundError:
        return "unknown"
