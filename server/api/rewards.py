"""POST /v1/rewards: the raw scores that a reward model gives to texts, token ids or conversations."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..engine.request import Request as EngineRequest
from ..text.text import Text
from . import body as bodies
from . import fields
from .errors import ApiError, bug, invalid
from .generation import Generation, Part
from .protocol import RewardBody
from .service import Service, check_ids, encode, in_thread_if
from .streaming import JsonAnswer, whole

router = APIRouter()


@router.post("/v1/rewards")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, RewardBody, fields.REWARDS, service.options)
    card = service.card(body.model, gives="scores")
    if card.labels != 1:
        raise invalid(f"{card.name!r} gives {card.labels} scores per text; a reward is one", "model")
    text = service.texts(card)
    prompts = await prompts_of(body, card, text)
    deadline = service.deadline(body)
    parts = [
        Part(
            EngineRequest(
                id=service.client.next_id(),
                model=card.name,
                token_ids=ids,
                want=frozenset({"score"}),
                priority=body.priority,
                deadline=deadline,
                cache_salt=body.cache_salt,
            ),
            [],
        )
        for ids in prompts
    ]
    service.traffic.scored(card, len(prompts))
    generation = Generation(service.client, parts, request.state.request_id)
    await whole(request, generation)
    data = [entry(index, part, request.state.request_id) for index, part in enumerate(parts)]
    usage = generation.usage()
    answer = {"object": "list", "model": card.name, "weight_version": generation.weight_version}
    return JsonAnswer({**answer, "data": data, "usage": usage}, headers)


async def prompts_of(body: RewardBody, card: ModelCard, text: Text) -> list[list[int]]:
    if (body.input is None) == (body.conversations is None):
        raise invalid("send either input or conversations", "input")
    if body.input is not None:
        param = "input"
        prompts = await encode(text, body.input, body.add_special_tokens is not False, card, param)
    else:
        param = "conversations"
        prompts: list[list[int]] = []
        for index, messages in enumerate(body.conversations or []):
            try:
                ids = await in_thread_if(
                    True,
                    lambda messages=messages: text.render(
                        messages,
                        add_generation_prompt=False,
                        kwargs=body.chat_template_kwargs,
                        add_special_tokens=bool(body.add_special_tokens),
                    ),
                )
            except ApiError as error:
                where = (error.param or "").removeprefix("messages")
                raise invalid(f"conversation {index}: {error.message}", f"conversations[{index}]{where}") from None
            check_ids(ids, card, param)
            prompts.append(ids)
    limit = min(card.context, card.max_request_tokens or card.context)
    for index, ids in enumerate(prompts):
        if not 0 < len(ids) <= limit:
            raise invalid(
                f"{param}[{index}] has {len(ids)} tokens; {card.name!r} takes 1 to {limit}",
                param,
                "context_length_exceeded" if ids else None,
            )
    return prompts


def entry(index: int, part: Part, request_id: str) -> dict[str, Any]:
    """A failed score is an error, never a number."""
    scores = part.scores
    if scores is None or len(scores) != 1 or not math.isfinite(scores[0]):
        raise bug(request_id, f"the model's score of input {index} is no finite number: {scores}")
    return {
        "index": index,
        "reward": scores[0],
        "raw_reward": scores[0],
        "pooled_index": part.pooled_index,
        "prompt_tokens": len(part.request.token_ids),
    }
