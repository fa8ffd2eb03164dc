"""slime's remote reward model, POST /rm: one prompt and response to a bare number."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator

from ..api import body as bodies
from ..api import fields
from ..api.fields import honoured, ignored
from ..api.protocol import Common, Message, conversations_of
from ..api.scoring import score
from ..api.service import Service, check_ids, in_thread_if
from ..text.text import Text
from .urls import model_of, rewards_of

router = APIRouter()

RM: dict[str, fields.Field] = {
    **honoured("model", "prompt", "response", "priority", "cache_salt", "timeout", "add_special_tokens"),
    "label": ignored("a reward model knows no right answer"),
    "metadata": ignored("a reward model reads the text alone"),
}


def prompt_of(value: object) -> str | list[Message]:
    return value if isinstance(value, str) else conversations_of([value])[0]


class Rollout(Common):
    prompt: Annotated[str | list[Message], BeforeValidator(prompt_of)]
    response: str


@router.post("/rm")
async def rm(request: Request) -> JSONResponse:
    service = Service.of(request)
    body, headers = await bodies.read(request, Rollout, RM, service.options)
    card = model_of(request, body.model)
    text = service.texts(card)
    ids = await in_thread_if(True, lambda: tokens_of(body, text))
    check_ids(ids, card, "prompt")
    scored = await score(request, card, [ids], body, "prompt")
    return JSONResponse(rewards_of(request, card, scored.scores)[0], headers=headers)


def tokens_of(body: Rollout, text: Text) -> list[int]:
    """A prompt that is text goes on with the response; one that is messages gets it as the assistant's."""
    if isinstance(body.prompt, str):
        return text.encode(body.prompt + body.response, body.add_special_tokens is not False, "prompt")
    messages = [*body.prompt, {"role": "assistant", "content": body.response}]
    return text.render(messages, add_generation_prompt=False, add_special_tokens=bool(body.add_special_tokens))
