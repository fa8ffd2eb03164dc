"""LoRA adapters come and go: vLLM's /v1/load_lora_adapter and its twin, and the names without /v1 that SGLang and
prime-rl use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from ..api import body as bodies
from ..api import fields
from ..api.fields import honoured, ignored, refused
from ..api.protocol import Body
from ..api.service import Service
from ..engine.commands import LoadAdapter, UnloadAdapter
from .orders import carried_out, trained

admin = APIRouter()

LOAD: dict[str, fields.Field] = {
    **honoured("lora_name", "lora_path", "load_inplace"),
    "pinned": ignored("an adapter stays until it is unloaded"),
    "lora_id": ignored("an adapter has one name"),
    "is_3d_lora_weight": refused("there are no experts", False),
}
UNLOAD: dict[str, fields.Field] = {
    **honoured("lora_name"),
    "lora_int_id": ignored("an adapter has one name"),
    "lora_id": ignored("an adapter has one name"),
}
Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadBody(Body):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool | None = None  # one of that name may be there and is replaced


class UnloadBody(Body):
    lora_name: Name


@admin.post("/v1/load_lora_adapter")
async def load(request: Request) -> JSONResponse:
    return await loaded(request, replaces=False)


@admin.post("/load_lora_adapter")
async def load_again(request: Request) -> JSONResponse:
    """prime-rl gives its new weights the old name."""
    return await loaded(request, replaces=True)


async def loaded(request: Request, replaces: bool) -> JSONResponse:
    body, _ = await bodies.read(request, LoadBody, LOAD, Service.of(request).options)
    replace = replaces if body.load_inplace is None else body.load_inplace
    command = LoadAdapter(trained(request).name, body.lora_name, body.lora_path, replace=replace)
    adapters = await carried_out(request, command, "lora_path")
    return JSONResponse(answer(adapters.names, f"LoRA adapter {body.lora_name!r} added"))


@admin.post("/v1/unload_lora_adapter")
@admin.post("/unload_lora_adapter")
async def unload(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, UnloadBody, UNLOAD, Service.of(request).options)
    adapters = await carried_out(request, UnloadAdapter(trained(request).name, body.lora_name))
    return JSONResponse(answer(adapters.names, f"LoRA adapter {body.lora_name!r} removed"))


def answer(names: tuple[str, ...], message: str) -> dict[str, Any]:
    return {"success": True, "message": message, "error_message": None, "loaded_adapters": list(names)}
