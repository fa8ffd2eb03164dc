"""POST /tokenize and /detokenize, in vLLM's shapes, for every hosted model."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from . import body as bodies
from . import fields
from .errors import invalid
from .protocol import DetokenizeBody, TokenizeBody
from .service import LONG_TEXT, Service, check_ids, in_thread_if
from .streaming import JsonAnswer

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, TokenizeBody, fields.TOKENIZE, service.options)
    card = service.hosted(body.model)
    text = service.texts(card)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    prompt, messages = body.prompt, body.messages
    if prompt is not None:
        special = body.add_special_tokens is not False
        ids = await in_thread_if(len(prompt) > LONG_TEXT, lambda: text.encode(prompt, special, "prompt"))
    else:
        opens = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        ids = await in_thread_if(
            True,
            lambda: text.render(
                messages or (),
                tools=body.tools,
                add_generation_prompt=opens,
                continue_final_message=body.continue_final_message,
                kwargs=body.chat_template_kwargs,
                add_special_tokens=bool(body.add_special_tokens),
            ),
        )
    written = [text.token(token_id) for token_id in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": card.context, "tokens": ids, "token_strs": written}
    return JsonAnswer(answer, headers)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, DetokenizeBody, fields.DETOKENIZE, service.options)
    card = service.hosted(body.model)
    text, ids = service.texts(card), body.tokens
    check_ids(ids, card, "tokens")
    prompt = await in_thread_if(len(ids) > LONG_TEXT, lambda: text.decode(ids, body.skip_special_tokens))
    return JsonAnswer({"prompt": prompt}, headers)
