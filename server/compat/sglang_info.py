"""What SGLang's clients ask a server about itself; `/server_info`, which vLLM has as well, answers both."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ..api import state
from ..api.errors import unavailable
from ..api.metrics import ENGINE_SECONDS
from ..api.service import Service
from ..engine.counts import ModelStats
from ..engine.request import ModelCard
from .orders import trained
from .versions import version_name
from .vllm_control import WORLD_SIZE

router = APIRouter()


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> JSONResponse:
    """What Tandem says of itself, then what TRL reads in vLLM's answer, then what slime reads in SGLang's."""
    service = Service.of(request)
    about, cards = await state.about(service), service.catalog().models
    card = next((card for card in cards if card.gives == "text"), cards[0])
    engine = cast("Mapping[str, Any]", service.settings.get("engine", {}))
    return JSONResponse(about | {"vllm_config": vllm_config(card, engine)} | sglang_arguments(card))


def vllm_config(card: ModelCard, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Of vLLM's configuration the values that clients read. `engine`: the engine's options, by name."""
    adapters = {name: engine.get(name) for name in ("max_loras", "max_lora_rank")}
    return {
        "model_config": {
            "model": card.path,
            "served_model_name": card.name,
            "dtype": f"torch.{card.dtype}",
            "max_model_len": card.context,
        },
        "parallel_config": {
            "tensor_parallel_size": WORLD_SIZE,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "world_size": WORLD_SIZE,
        },
        "weight_transfer_config": {"backend": "nccl"},
        "lora_config": adapters if adapters["max_loras"] else None,  # None: there is no room for any
    }


def sglang_arguments(card: ModelCard) -> dict[str, Any]:
    return {
        "model_path": card.path,
        "tokenizer_path": card.path,
        "served_model_name": card.name,
        "dtype": card.dtype,
        "context_length": card.context,
        "tp_size": WORLD_SIZE,
        "pp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "disaggregation_mode": "null",
        "weight_version": version_name(card, card.weight_version),
    }


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> JSONResponse:
    card = trained(request)
    return JSONResponse(
        {
            "model_path": card.path,
            "served_model_name": card.name,
            "tokenizer_path": card.path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": version_name(card, card.weight_version),
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "architectures": [card.architecture],
        }
    )


@router.get("/health_generate")
async def health_generate(request: Request) -> JSONResponse:
    """The engine's heartbeat says what SGLang learns from a generated token, also while generation is paused."""
    return await state.health(request)


@router.get("/v1/loads")
async def loads(request: Request) -> JSONResponse:
    """Of all models that write text together: they share the device. `include` selects nothing, there is one part."""
    service = Service.of(request)
    stats = await service.client.stats(ENGINE_SECONDS)
    if stats is None:
        raise unavailable("the engine does not say what it does")
    names = {card.name for card in service.catalog().models if card.gives == "text"}
    return JSONResponse(
        {
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": state.installed_version(),
            "loads": [load([one for one in stats if one.name in names])],
        }
    )


def load(stats: list[ModelStats]) -> dict[str, Any]:
    used = sum(one.pages_used * one.page_size for one in stats)
    room = sum(one.pages * one.page_size for one in stats)
    return {
        "dp_rank": 0,
        "num_running_reqs": sum(one.running for one in stats),
        "num_waiting_reqs": sum(one.waiting for one in stats),
        "num_used_tokens": used,
        "max_total_num_tokens": room,
        "token_usage": used / room if room else 0.0,
    }
