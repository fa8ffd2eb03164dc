"""POST /v1/embeddings: what an embedding model makes of texts or token ids."""

from __future__ import annotations

import math
import struct
from base64 import b64encode
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..engine.request import Request as EngineRequest
from . import body as bodies
from . import fields
from .errors import bug, invalid
from .generation import Generation, Part
from .protocol import EmbeddingBody
from .service import Service, encode, in_thread_if
from .streaming import JsonAnswer, whole

MANY = 1 << 16  # numbers; scaling and packing so many takes 10 ms

router = APIRouter()


@router.post("/v1/embeddings")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, EmbeddingBody, fields.EMBEDDINGS, service.options)
    card = service.card(body.model, gives="embeddings")
    size = card.embedding_size if body.dimensions is None else body.dimensions
    if size > card.embedding_size:
        raise invalid(f"dimensions is {size}; {card.name!r} gives 1 to {card.embedding_size}", "dimensions")
    prompts = await prompts_of(body, card, service)
    deadline = service.deadline(body)
    parts = [
        Part(
            EngineRequest(
                id=service.client.next_id(),
                model=card.name,
                token_ids=ids,
                want=frozenset({"embedding"}),
                priority=body.priority,
                deadline=deadline,
                cache_salt=body.cache_salt,
            ),
            [],
        )
        for ids in prompts
    ]
    request_id = request.state.request_id
    generation = Generation(service.client, parts, request_id)
    await whole(request, generation)

    def work() -> list[dict[str, Any]]:
        return [entry(index, part, size, body, card, request_id) for index, part in enumerate(parts)]

    data = await in_thread_if(size * len(parts) > MANY, work)
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonAnswer({"object": "list", "model": card.name, "data": data, "usage": usage}, headers)


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
    for index, ids in enumerate(prompts):
        if len(ids) > limit:
            message = f"input[{index}] has {len(ids)} tokens; {card.name!r} takes 1 to {limit}"
            raise invalid(message, "input", "context_length_exceeded")
    return prompts


def entry(index: int, part: Part, size: int, body: EmbeddingBody, card: ModelCard, request_id: str) -> dict[str, Any]:
    """The first `size` numbers, then divided by their length where embeddings are normalised, as float32."""
    found = part.embedding
    if found is None or len(found) != card.embedding_size or not all(map(math.isfinite, found)):
        raise bug(request_id, f"the model's embedding of input {index} is not {card.embedding_size} finite numbers")
    values = found[:size]
    if card.normalized if body.normalize is None else body.normalize:
        length = math.hypot(*values) or 1.0
        values = [value / length for value in values]
    packed = struct.pack(f"<{size}f", *values)
    shown = b64encode(packed).decode() if body.encoding_format == "base64" else struct.unpack(f"<{size}f", packed)
    return {"object": "embedding", "index": index, "embedding": shown}
