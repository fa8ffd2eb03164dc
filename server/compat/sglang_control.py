"""SGLang's control routes, which slime and AReaL call, and AReaL's own names for some of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.errors import invalid, unavailable
from ..api.fields import honoured, ignored, refused
from ..api.metrics import ENGINE_SECONDS
from ..api.protocol import INT64, Body, Size, refuse
from ..api.service import Service
from ..engine.commands import (
    AbortAll,
    DestroyTransfer,
    InitTransfer,
    Pause,
    ResetPrefixCache,
    Resume,
    UpdateWeights,
)
from .orders import carried_out, stopped, trained
from .vllm_control import tensor_specs, version_of

admin = APIRouter()

WHOLE_BUCKET = 1 << 62  # bytes: a flattened bucket is one broadcast, however long


def port_of(value: object) -> int:
    """AReaL sends it as text."""
    if isinstance(value, str) and value.isdigit() and len(value) <= 5:
        value = int(value)
    if type(value) is not int or not 0 < value < 65536:
        refuse("it must be a port, 1 to 65535")
    return value


Version = Annotated[str, BeforeValidator(version_of)]


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(Body):
    rid: str = ""
    abort_all: bool = False


class DiskBody(Body):
    model_path: Annotated[str, Field(min_length=1)]
    abort_all_requests: bool = False
    weight_version: Version = ""


class GroupBody(Body):
    master_address: str
    master_port: Annotated[int, BeforeValidator(port_of)]
    rank_offset: Annotated[int, Field(ge=1, lt=INT64)]
    world_size: Annotated[int, Field(ge=2, lt=INT64)]
    group_name: str = "weight_update_group"
    backend: Literal["nccl", "gloo"] = "nccl"


class BroadcastBody(Body):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[Size]]
    group_name: str = "weight_update_group"
    abort_all_requests: bool = False
    weight_version: Version = ""
    load_format: Literal["flattened_bucket"] | None = None


class LeaveBody(Body):
    group_name: str = "weight_update_group"


KEYED = ignored("the cache knows what was computed with which weights")
MEMORY = ignored("memory is kept")
PAUSE = honoured("mode")
RESUME: dict[str, fields.Field] = {"torch_empty_cache": MEMORY}
ABORT = honoured("rid", "abort_all")
DISK: dict[str, fields.Field] = {
    **honoured("model_path", "abort_all_requests", "weight_version"),
    "load_format": refused("safetensors are read", "auto", "safetensors"),
    "is_async": ignored("other requests are always served meanwhile"),
    "keep_pause": ignored("a paused model stays so"),
    "flush_cache": KEYED,
    "torch_empty_cache": MEMORY,
    "recapture_cuda_graph": ignored("weights are replaced in place"),
    "token_step": ignored("weight_version names the weights"),
    "manifest": ignored("the files name their tensors"),
}
GROUP: dict[str, fields.Field] = {
    **honoured("master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"),
    "pp_rank": refused("a model is not cut into stages", 0),
}
BROADCAST: dict[str, fields.Field] = {
    **honoured("names", "dtypes", "shapes", "group_name", "abort_all_requests", "weight_version", "load_format"),
    "flush_cache": KEYED,
    "selector": refused("there is no draft model", "all", "target"),
    "torch_empty_cache": MEMORY,
}
LEAVE = honoured("group_name")


@admin.post("/pause_generation")
async def pause_generation(request: Request) -> JSONResponse:
    """`abort` ends what runs; the other two freeze it, and none refuses what comes: it waits."""
    body, _ = await bodies.read(request, PauseBody, PAUSE, Service.of(request).options, may_be_empty=True)
    if body.mode == "abort":
        await stopped(request)
    else:
        await carried_out(request, Pause(request.query_params.get("model"), "keep"))
    return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})


@admin.post("/continue_generation")
async def continue_generation(request: Request) -> JSONResponse:
    await bodies.read(request, Body, RESUME, Service.of(request).options, may_be_empty=True)
    await carried_out(request, Resume(request.query_params.get("model")))
    return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})


@admin.get("/flush_cache")
@admin.post("/flush_cache")
async def flush_cache(request: Request) -> PlainTextResponse:
    """Only while the models that write are idle or paused; slime asks until they are."""
    service = Service.of(request)
    stats = await service.client.stats(ENGINE_SECONDS)
    if stats is None:
        raise unavailable("the engine does not say what it does")
    paused = {card.name for card in service.catalog().models if card.paused}
    busy = sum(one.running + one.waiting for one in stats if one.name not in paused)
    if busy:
        raise invalid(f"{busy} requests run or wait; pause first, or ask again", code="busy")
    await carried_out(request, ResetPrefixCache())
    return PlainTextResponse("Cache flushed.\n")


@admin.post("/abort_request")
async def abort_request(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, AbortBody, ABORT, Service.of(request).options)
    if not body.abort_all:
        raise invalid("a request ends when its connection is closed; abort_all: true ends all", "abort_all")
    aborted = await carried_out(request, AbortAll(request.query_params.get("model")))
    return JSONResponse({"success": True, "aborted": aborted.requests})


@admin.post("/update_weights_from_disk")
async def update_weights_from_disk(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, DiskBody, DISK, Service.of(request).options)
    card = trained(request)
    in_flight = "abort" if body.abort_all_requests else "keep" if card.paused else "wait"
    label = body.weight_version
    command = UpdateWeights(card.name, "disk", body.model_path, in_flight=in_flight, label=label, alone=True)
    await carried_out(request, command, "model_path")
    return JSONResponse(done("Succeeded to update model weights.") | {"num_paused_requests": 0})


@admin.post("/init_weights_update_group")
async def init_weights_update_group(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, GroupBody, GROUP, Service.of(request).options)
    await carried_out(
        request,
        InitTransfer(
            body.master_address,
            body.master_port,
            body.rank_offset,
            body.world_size,
            body.backend,
            body.group_name,
        ),
    )
    return JSONResponse(done("Succeeded to initialize custom process group."))


@admin.post("/destroy_weights_update_group")
async def destroy_weights_update_group(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, LeaveBody, LEAVE, Service.of(request).options, may_be_empty=True)
    await carried_out(request, DestroyTransfer(body.group_name))
    return JSONResponse(done("Succeeded to destroy custom process group."))


@admin.post("/update_weights_from_distributed")
async def update_weights_from_distributed(request: Request) -> JSONResponse:
    """A part of the tensors at a time; each is in force when the answer comes."""
    body, _ = await bodies.read(request, BroadcastBody, BROADCAST, Service.of(request).options)
    card = trained(request)
    command = UpdateWeights(
        card.name,
        "distributed",
        tensors=tensor_specs(body.names, body.dtypes, body.shapes, "names"),
        group=body.group_name,
        packed=body.load_format is not None,
        chunk_bytes=WHOLE_BUCKET,
        partial=True,
        in_flight="abort" if body.abort_all_requests else "keep",
        label=body.weight_version,
        alone=True,
    )
    await carried_out(request, command)
    return JSONResponse(done("Succeeded to update parameter online."))


@admin.post("/areal_pause_generation")
async def areal_pause_generation(request: Request) -> JSONResponse:
    await stopped(request)
    return JSONResponse(done("Generation paused and all requests aborted"))


@admin.post("/areal_continue_generation")
async def areal_continue_generation(request: Request) -> JSONResponse:
    await carried_out(request, Resume(request.query_params.get("model")))
    return JSONResponse(done("Generation continued"))


@admin.post("/areal_update_weights")
async def areal_update_weights(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, DiskBody, DISK, Service.of(request).options)
    card = trained(request)
    label = body.weight_version
    command = UpdateWeights(card.name, "disk", body.model_path, in_flight="abort", label=label, alone=True)
    await carried_out(request, command, "model_path")
    return JSONResponse(done("Weights updated"))


def done(message: str) -> dict[str, Any]:
    return {"success": True, "message": message}
