"""What every route that scores texts does: the engine's requests, and scores that are there and finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ..engine.request import ModelCard
from .errors import bug, invalid
from .generation import Generation, Part
from .protocol import Common
from .service import Service
from .streaming import whole


@dataclass(frozen=True, slots=True)
class Scored:
    scores: list[list[float]]  # raw: of each text one per label, all finite
    pooled: list[int | None]  # the position that they were read at; None: all were pooled
    usage: dict[str, Any]
    weight_version: int


async def score(request: Request, card: ModelCard, prompts: Sequence[list[int]], body: Common, param: str) -> Scored:
    """Raises ApiError: a failed score is an error, never a number. `param` names the field the texts came from."""
    service = Service.of(request)
    check_lengths(prompts, card, param)
    deadline = service.deadline(body)
    parts = [Part(service.request(card, ids, body, deadline, "score"), []) for ids in prompts]
    service.traffic.scored(card, len(prompts))
    generation = Generation(service.client, parts, request.state.request_id)
    await whole(request, generation)
    scores = [_finite(index, part, card, request.state.request_id) for index, part in enumerate(parts)]
    return Scored(scores, [part.pooled_index for part in parts], generation.usage(), generation.weight_version)


def reward_model(service: Service, name: str | None) -> ModelCard:
    """The model of that name, or the first that scores; it has one score per text."""
    card = service.card(name, gives="scores")
    if card.labels != 1:
        raise invalid(f"{card.name!r} gives {card.labels} scores per text; a reward is one", "model")
    return card


def check_lengths(prompts: Sequence[list[int]], card: ModelCard, param: str) -> None:
    limit = min(card.context, card.max_request_tokens or card.context)
    for index, ids in enumerate(prompts):
        if not 0 < len(ids) <= limit:
            raise invalid(
                f"{param}[{index}] has {len(ids)} tokens; {card.name!r} takes 1 to {limit}",
                param,
                "context_length_exceeded" if ids else None,
            )


def _finite(index: int, part: Part, card: ModelCard, request_id: str) -> list[float]:
    scores = part.scores
    if scores is None or len(scores) != card.labels or not all(map(math.isfinite, scores)):
        raise bug(request_id, f"the model's score of input {index} is no finite number: {scores}")
    return scores
