"""POST /v1/rewards: the scores that a reward model gives to texts, token ids or conversations; raw unless asked."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..text.text import Text
from . import body as bodies
from . import fields
from .errors import ApiError, invalid
from .protocol import RewardBody
from .rlhf.evaluation import normalised
from .scoring import reward_model, score
from .service import Service, check_ids, encode, in_thread_if
from .streaming import JsonAnswer

router = APIRouter()


@router.post("/v1/rewards")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, RewardBody, fields.REWARDS, service.options)
    card = reward_model(service, body.model)
    prompts = await prompts_of(body, card, service.texts(card))
    scored = await score(request, card, prompts, body, "input" if body.conversations is None else "conversations")
    data = [
        {
            "index": index,
            "reward": normalised(score, card) if body.normalize else score,
            "raw_reward": score,
            "pooled_index": pooled,
            "prompt_tokens": len(ids),
        }
        for index, (ids, (score,), pooled) in enumerate(zip(prompts, scored.scores, scored.pooled, strict=True))
    ]
    answer = {"object": "list", "model": card.name, "weight_version": scored.weight_version}
    return JsonAnswer({**answer, "data": data, "usage": scored.usage}, headers)


async def prompts_of(body: RewardBody, card: ModelCard, text: Text) -> list[list[int]]:
    if (body.input is None) == (body.conversations is None):
        raise invalid("send either input or conversations", "input")
    if body.input is not None:
        return await encode(text, body.input, body.add_special_tokens is not False, card, "input")
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
        check_ids(ids, card, "conversations")
        prompts.append(ids)
    return prompts
