"""vLLM's control routes, which TRL, prime-rl and SkyRL call between two training steps.

They are about all models, or about `?model=NAME`; weights without a name are the first policy's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.errors import invalid
from ..api.fields import honoured, ignored, refused
from ..api.protocol import INT64, MAX_LABEL, Body, Size, refuse
from ..api.service import Service
from ..engine.commands import (
    AbortAll,
    FinishUpdate,
    InitTransfer,
    LabelWeights,
    Pause,
    ResetPrefixCache,
    Resume,
    StartUpdate,
    TensorSpec,
    UpdateWeights,
)
from .orders import carried_out, trained
from .versions import version_name

router = APIRouter()
admin = APIRouter()  # what may not be called by everybody

WORLD_SIZE = 1  # processes that share a model
TRANSFER_GROUP = ""  # torch's default one
MODES = ("abort", "wait", "keep")


class AbortBody(Body):
    request_ids: list[str] = Field(default_factory=list[str])


class InitInfo(Body):
    master_address: str
    master_port: Annotated[int, Field(ge=1, lt=65536)]
    rank_offset: Annotated[int, Field(ge=1, lt=INT64)]
    world_size: Annotated[int, Field(ge=2, lt=INT64)]
    packed: bool = False
    backend: Literal["nccl", "gloo"] = "nccl"


class InitBody(Body):
    init_info: InitInfo


class UpdateInfo(Body):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[Size]]
    packed: bool | None = None  # None: as the group was initialised
    packed_buffer_size_bytes: Annotated[int, Field(ge=1, lt=INT64)] = 1 << 30

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Raises ApiError."""
        return tensor_specs(self.names, self.dtype_names, self.shapes, "update_info")


class UpdateBody(Body):
    update_info: UpdateInfo | None = None
    weight_dir: str | None = None  # prime-rl's: a checkpoint that lies on disk
    weight_version: Annotated[str, Field(max_length=MAX_LABEL)] = ""


class FinishBody(Body):
    weight_version: Annotated[str, Field(max_length=MAX_LABEL)] = ""


def version_of(value: object) -> str:
    """Trainers count, or name."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        refuse("it must be a string, not empty")
    if (isinstance(value, int) and not 0 <= value < INT64) or len(str(value)) > MAX_LABEL:
        refuse(f"it may have at most {MAX_LABEL} characters, or be a count")
    return str(value)


class VersionBody(Body):
    new_version: Annotated[str, BeforeValidator(version_of)]


INIT = honoured("init_info")
UPDATE: dict[str, fields.Field] = {
    **honoured("update_info", "weight_dir", "weight_version"),
    "reset_prefix_cache": ignored("the cache knows what was computed with which weights"),
}
START: dict[str, fields.Field] = {"is_checkpoint_format": refused("tensors are named as in the checkpoint", True)}
FINISH = honoured("weight_version")
VERSION: dict[str, fields.Field] = {
    **honoured("new_version"),
    "abort_all_requests": ignored("a name changes no answer"),
}
ABORT = honoured("request_ids")


def tensor_specs(names: list[str], dtypes: list[str], shapes: list[list[Size]], field: str) -> tuple[TensorSpec, ...]:
    """Raises ApiError."""
    if not names or not len(names) == len(dtypes) == len(shapes):
        message = f"{field} has {len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes"
        raise invalid(f"{message}; there must be as many of each, and one at least", field)
    return tuple(
        TensorSpec(name, dtype.removeprefix("torch."), tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    )


@admin.post("/pause")
async def pause(request: Request) -> JSONResponse:
    mode = request.query_params.get("mode", "abort")
    if mode not in MODES:
        raise invalid(f"mode is {mode[:80]!r}; it must be {', '.join(MODES[:-1])} or {MODES[-1]}", "mode")
    clear = request.query_params.get("clear_cache", "true").lower() not in ("false", "0")
    model = request.query_params.get("model")
    await carried_out(request, Pause(model, mode, clear_cache=clear and mode != "keep"))
    return JSONResponse({"status": "paused"})


@admin.post("/resume")
async def resume(request: Request) -> JSONResponse:
    await carried_out(request, Resume(request.query_params.get("model")))
    return JSONResponse({"status": "resumed"})


@router.get("/is_paused")
async def is_paused(request: Request) -> JSONResponse:
    service = Service.of(request)
    name = request.query_params.get("model")
    cards = service.catalog().models if name is None else [service.hosted(name)]
    return JSONResponse({"is_paused": any(card.paused for card in cards)})


@admin.post("/abort_requests")
async def abort_requests(request: Request) -> Response:
    body, _ = await bodies.read(request, AbortBody, ABORT, Service.of(request).options, may_be_empty=True)
    if body.request_ids:
        raise invalid("a request ends when its connection is closed; without request_ids all end", "request_ids")
    aborted = await carried_out(request, AbortAll(request.query_params.get("model")))
    return JSONResponse({"status": "aborted", "aborted": aborted.requests})


@admin.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> JSONResponse:
    await carried_out(request, ResetPrefixCache(request.query_params.get("model")))
    return JSONResponse({"success": True})


@router.get("/get_world_size")
async def get_world_size() -> JSONResponse:
    return JSONResponse({"world_size": WORLD_SIZE})


@admin.post("/init_weight_transfer_engine")
async def init_weight_transfer_engine(request: Request) -> JSONResponse:
    """Returns once the trainer, which is rank 0, and the server have met."""
    body, _ = await bodies.read(request, InitBody, INIT, Service.of(request).options)
    info = body.init_info
    await carried_out(
        request,
        InitTransfer(
            info.master_address,
            info.master_port,
            info.rank_offset,
            info.world_size,
            info.backend,
            TRANSFER_GROUP,
            packed=info.packed,
        ),
    )
    return JSONResponse({"message": "Weight transfer initialized"})


@admin.post("/start_weight_update")
async def start_weight_update(request: Request) -> JSONResponse:
    await bodies.read(request, Body, START, Service.of(request).options, may_be_empty=True)
    await carried_out(request, StartUpdate(trained(request).name))
    return JSONResponse({"message": "Weight update started"})


@admin.post("/update_weights")
async def update_weights(request: Request) -> JSONResponse:
    """By broadcast where `update_info` says what comes, from disk where `weight_dir` says where it lies."""
    body, _ = await bodies.read(request, UpdateBody, UPDATE, Service.of(request).options)
    model = trained(request).name
    info = body.update_info
    if (info is None) == (body.weight_dir is None):
        raise invalid("send either update_info (a broadcast) or weight_dir (a checkpoint on disk)", "update_info")
    if info is None:
        command = UpdateWeights(model, "disk", body.weight_dir or "", label=body.weight_version)
    else:
        command = UpdateWeights(
            model,
            "distributed",
            tensors=info.tensors(),
            group=TRANSFER_GROUP,
            packed=info.packed,
            chunk_bytes=info.packed_buffer_size_bytes,
            partial=True,
            label=body.weight_version,
        )
    await carried_out(request, command, "weight_dir")
    return JSONResponse({"message": "Weights updated", "status": "ok"})


@admin.post("/finish_weight_update")
async def finish_weight_update(request: Request) -> JSONResponse:
    body, _ = await bodies.read(request, FinishBody, FINISH, Service.of(request).options, may_be_empty=True)
    await carried_out(request, FinishUpdate(trained(request).name, partial=True, label=body.weight_version))
    return JSONResponse({"message": "Weight update finished"})


@admin.post("/update_weight_version")
async def update_weight_version(request: Request) -> JSONResponse:
    """SGLang has the route, too."""
    body, _ = await bodies.read(request, VersionBody, VERSION, Service.of(request).options)
    await carried_out(request, LabelWeights(trained(request).name, body.new_version))
    message = f"Weight version updated to {body.new_version}"
    return JSONResponse({"success": True, "message": message, "new_version": body.new_version})


@router.get("/weight_info")
@router.get("/get_weight_version")
async def weight_info(request: Request) -> JSONResponse:
    """The second name is SGLang's."""
    card = trained(request)
    return JSONResponse({"weight_version": version_name(card, card.weight_version)})
