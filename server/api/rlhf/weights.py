"""POST /v1/rlhf/weights: new weights for a hosted model while it serves. GET shows which it has."""

from __future__ import annotations

import binascii
import time
from base64 import b64decode
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...engine.commands import IpcTensor, LoadAdapter, UpdateWeights
from ...engine.request import ModelCard
from .. import body as bodies
from ..errors import invalid
from ..service import Service
from ..streaming import JsonAnswer
from . import fields
from .bodies import IpcHandle, WeightsBody
from .roles import card_of

router, admin = APIRouter(), APIRouter()


@admin.post("/v1/rlhf/weights")
async def create(request: Request) -> Response:
    service, request_id = Service.of(request), request.state.request_id
    body, headers = await bodies.read(request, WeightsBody, fields.WEIGHTS, service.options)
    check(body)
    card = card_of(service, "policy", None) if body.model is None else service.hosted(body.model)
    began = time.perf_counter()
    if body.adapter is not None:
        command = LoadAdapter(card.name, body.adapter, body.path or "", replace=True)
        loaded = await service.command(command, request_id)
        answer: dict[str, Any] = {"model": card.name, "source": body.source, "adapter": body.adapter}
        answer["adapters"] = loaded.names
    else:
        updated = await service.command(update_of(service, body, card), request_id)
        answer = {
            "model": card.name,
            "models": updated.models,
            "source": body.source,
            "version": updated.version,
            "label": updated.label,
            "tensors": updated.tensors,
            "bytes": updated.bytes,
            "kv_invalidated": updated.kv_invalidated,
            "stage_seconds": updated.stage_seconds,
            "commit_seconds": updated.commit_seconds,
        }
    return JsonAnswer({**answer, "seconds": time.perf_counter() - began}, headers)


@router.get("/v1/rlhf/weights")
async def every(request: Request) -> Response:
    models = [shown(card) for card in Service.of(request).catalog().models]
    return JSONResponse({"object": "list", "data": models})


def shown(card: ModelCard) -> dict[str, Any]:
    """`label`: what the trainer calls the version."""
    return {
        "model": card.name,
        "role": card.role,
        "version": card.weight_version,
        "label": card.weight_label,
        "paused": card.paused,
    }


def check(body: WeightsBody) -> None:
    """What no field alone can tell."""
    takes = {"disk": ("path",), "lora": ("path", "adapter"), "shm": ("path", "size"), "cuda_ipc": ("handles",)}
    source = body.source
    for name in ("path", "adapter", "size", "handles"):
        given, may = getattr(body, name) is not None, name in takes[source]
        if given and not may:
            raise invalid(f"{name} is not for source {source!r}, which takes {' and '.join(takes[source])}", name)
        if may and not given and name not in ("size", "adapter"):
            raise invalid(f"{name} is missing: source {source!r} needs it", name, "missing")
    for name in ("partial", "also", "version"):
        if body.adapter is not None and getattr(body, name):
            raise invalid(f"{name} is for the model's own weights, not for an adapter beside them", name)


def update_of(service: Service, body: WeightsBody, card: ModelCard) -> UpdateWeights:
    return UpdateWeights(
        model=card.name,
        source=body.source,
        path=body.path or "",
        size=body.size or 0,
        handles=tuple(tensor_of(handle, f"handles[{i}]") for i, handle in enumerate(body.handles or ())),
        partial=body.partial,
        also=tuple(service.hosted(name, "also").name for name in body.also),
        in_flight=body.in_flight,
        label=body.version or "",
        alone=True,
    )


def tensor_of(handle: IpcHandle, where: str) -> IpcTensor:
    try:
        ipc, counter, event = (b64decode(text, validate=True) for text in (handle.handle, handle.counter, handle.event))
    except binascii.Error as error:
        raise invalid(f"{where} has a handle that is no base64: {error}", where) from None
    return IpcTensor(
        name=handle.name,
        dtype=handle.dtype,
        shape=tuple(handle.shape),
        storage=(
            handle.device,
            ipc,
            handle.storage_bytes,
            handle.storage_offset,
            counter,
            handle.counter_offset,
            event,
            handle.event_sync,
        ),
        offset=handle.offset,
    )
