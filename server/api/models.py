"""GET /v1/models and /v1/models/{id}"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ..engine.request import ModelCard
from .errors import no_such_model
from .protocol import GenerationBody
from .service import Service

router = APIRouter()

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
)


@router.get("/v1/models")
async def every(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [shown(card) for card in Service.of(request).catalog().listed]})


@router.get("/v1/models/{name:path}")
async def one(request: Request, name: str) -> JSONResponse:
    catalog = Service.of(request).catalog()
    card = catalog.find(name)
    if card is None:
        raise no_such_model(name, catalog)
    return JSONResponse(shown(card))


def shown(card: ModelCard) -> dict[str, Any]:
    about: dict[str, Any] = {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "tandem",
        "root": card.name,
        "parent": card.parent or None,
        "aliases": list(card.aliases),
        "role": card.role,
        "architecture": card.architecture,
        "dtype": card.dtype,
        "quantization": None if card.quantization == "none" else card.quantization,
        "kv_cache_dtype": card.kv_dtype or card.dtype,
        "max_model_len": card.context,
        "max_request_tokens": min(card.context, card.max_request_tokens or card.context),
        "weight_version": card.weight_version,
        "weight_label": card.weight_label,
        "paused": card.paused,
    }
    if card.fingerprint:
        about["tokenizer_fingerprint"] = card.fingerprint
    if card.shares:
        about["shares"] = card.shares
    if card.gives in ("scores", "values"):
        about["head"] = card.head
    if card.gives == "scores":
        about |= {"labels": card.labels, "pooling": card.pooling}
        about |= {"reward_mean": card.reward_mean, "reward_std": card.reward_std}
        about["reward_normalization"] = card.reward_normalization
    if card.gives == "embeddings":
        about |= {"embedding_size": card.embedding_size, "pooling": card.pooling, "normalized": card.normalized}
    if card.gives == "text":
        about["sampling_defaults"] = {name: GenerationBody.model_fields[name].default for name in SAMPLING}
    return about
