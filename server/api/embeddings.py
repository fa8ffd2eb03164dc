"""POST /v1/embeddings: what an embedding model makes of texts or token ids, or a reward model's scores of them."""

from __future__ import annotations

import math
import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from . import body as bodies
from . import fields
from .errors import bug, invalid
from .generation import Generation, Part
from .protocol import Common, EmbeddingBody
from .scoring import check_lengths, score
from .service import Service, encode, in_thread_if
from .streaming import JsonAnswer, whole

MANY = 1 << 16  # numbers; scaling and packing so many takes 10 ms

router = APIRouter()


@router.post("/v1/embeddings")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, EmbeddingBody, fields.EMBEDDINGS, service.options)
    card = embedder(service, body.model)
    prompts = await prompts_of(body, card, service)
    if card.gives == "scores":
        vectors, usage = await scores(request, body, card, prompts)
    else:
        vectors, usage = await embeddings(request, body, card, prompts, body.dimensions, body.normalize)

    def work() -> list[dict[str, Any]]:
        return [entry(index, vector, body.encoding_format) for index, vector in enumerate(vectors)]

    data = await in_thread_if(sum(map(len, vectors)) > MANY, work)
    return JsonAnswer({"object": "list", "model": card.name, "data": data, "usage": usage}, headers)


def embedder(service: Service, name: str | None) -> ModelCard:
    """The model of that name or the first that embeds. A reward model is taken for one, as SGLang does."""
    card = None if name is None else service.catalog().find(name)
    if card is not None and card.gives == "scores":
        return card
    return service.card(name, gives="embeddings")


async def scores(
    request: Request, body: EmbeddingBody, card: ModelCard, prompts: list[list[int]]
) -> tuple[list[list[float]], dict[str, Any]]:
    """A reward model's raw scores in the place of an embedding: verl reads its rewards there."""
    for name in ("dimensions", "normalize"):
        value = getattr(body, name)
        if value:
            raise invalid(f"{name} is {value}; {card.name!r} is a reward model, whose scores stay as they are", name)
    scored = await score(request, card, prompts, body, "input")
    tokens = scored.usage["prompt_tokens"]
    return scored.scores, {"prompt_tokens": tokens, "total_tokens": tokens}


async def embeddings(
    request: Request,
    body: Common,
    card: ModelCard,
    prompts: list[list[int]],
    dimensions: int | None = None,
    normalize: bool | None = None,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Of each prompt the first `dimensions` numbers, then divided by their length where embeddings are normalised:
    as the checkpoint says, or as `normalize` does."""
    service = Service.of(request)
    size = card.embedding_size if dimensions is None else dimensions
    if size > card.embedding_size:
        raise invalid(f"dimensions is {size}; {card.name!r} gives 1 to {card.embedding_size}", "dimensions")
    deadline = service.deadline(body)
    parts = [Part(service.request(card, ids, body, deadline, "embedding"), []) for ids in prompts]
    request_id = request.state.request_id
    generation = Generation(service.client, parts, request_id)
    await whole(request, generation)
    divided = card.normalized if normalize is None else normalize

    def work() -> list[list[float]]:
        return [vector_of(index, part, size, divided, card, request_id) for index, part in enumerate(parts)]

    tokens = sum(map(len, prompts))
    return await in_thread_if(size * len(parts) > MANY, work), {"prompt_tokens": tokens, "total_tokens": tokens}


async def prompts_of(body: EmbeddingBody, card: ModelCard, service: Service) -> list[list[int]]:
    """The token ids of each input, cut to its last ones where the request says so."""
    for index, prompt in enumerate(body.input):
        if not prompt:
            raise invalid(f"input[{index}] is empty: there is nothing to embed", "input")
    prompts = await encode(service.texts(card), body.input, body.add_special_tokens is not False, card, "input")
    limit = min(card.context, card.max_request_tokens or card.context)
    if body.truncate_prompt_tokens is not None:
        keep = body.truncate_prompt_tokens
        if keep == 0:
            message = "truncate_prompt_tokens is 0; it must be at least 1, or -1 for what fits"
            raise invalid(message, "truncate_prompt_tokens")
        prompts = [ids[-(limit if keep == -1 else keep) :] for ids in prompts]
    check_lengths(prompts, card, "input")
    return prompts


def vector_of(index: int, part: Part, size: int, normalize: bool, card: ModelCard, request_id: str) -> list[float]:
    found = part.embedding
    if found is None or len(found) != card.embedding_size or not all(map(math.isfinite, found)):
        raise bug(request_id, f"the model's embedding of input {index} is not {card.embedding_size} finite numbers")
    values = found[:size]
    if normalize:
        length = math.hypot(*values) or 1.0
        values = [value / length for value in values]
    return values


def entry(index: int, vector: list[float], encoding: str) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": encoded(vector, encoding)}


def encoded(vector: list[float], encoding: str) -> str | Sequence[float]:
    """As float32: numbers, or their bytes in base64."""
    packed = struct.pack(f"<{len(vector)}f", *vector)
    return b64encode(packed).decode() if encoding == "base64" else struct.unpack(f"<{len(vector)}f", packed)
