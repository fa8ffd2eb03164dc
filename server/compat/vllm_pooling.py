"""vLLM's /classify and /pooling.

Scores come raw. What vLLM does to them by default (a sigmoid where there is one label, a softmax over several) is
done where `use_activation` is true.
"""

from __future__ import annotations

import math
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.embeddings import embeddings, encoded
from ..api.errors import invalid
from ..api.fields import honoured, ignored, refused
from ..api.protocol import INT64, MAX_MESSAGES, Common, Message, Prompt, message_of, prompts_of
from ..api.scoring import check_lengths, score
from ..api.service import Service, check_ids, encode, in_thread_if
from ..api.streaming import JsonAnswer
from ..engine.request import ModelCard
from . import sglang_scoring

router = APIRouter()

COMMON: dict[str, fields.Field] = {
    **honoured("model", "use_activation", "priority", "cache_salt", "timeout", "add_special_tokens"),
    **honoured("truncate_prompt_tokens", "truncation_side"),
    "user": fields.ACCOUNT,
    "request_id": ignored("the x-request-id header names a request"),
    "padding": refused("nothing is padded", "do_not_pad"),
    "mm_processor_kwargs": fields.NO_IMAGES,
}
CLASSIFY: dict[str, fields.Field] = {
    **COMMON,
    **honoured("input", "messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    "chat_template": fields.CHAT["chat_template"],
    "media_io_kwargs": fields.NO_IMAGES,
}
POOLING: dict[str, fields.Field] = {
    **CLASSIFY,
    **honoured("task", "encoding_format"),
    "dimensions": refused("POST /v1/embeddings takes it"),
    "embed_dtype": fields.EMBEDDINGS["embed_dtype"],
    "endianness": refused("base64 holds little-endian numbers", "little", "native"),
}


class PoolingCommon(Common):
    use_activation: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    truncation_side: Literal["left", "right"] = "left"  # where it is cut

    @property
    def normalize(self) -> bool | None:
        """An embedding's activation is its division by its length."""
        return self.use_activation if "use_activation" in self.model_fields_set else None


class ClassifyBody(PoolingCommon):
    input: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    messages: (
        Annotated[list[Annotated[Message, BeforeValidator(message_of)]], Field(min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])


class PoolingBody(ClassifyBody):
    task: Literal["classify", "embed", "token_classify", "token_embed"] | None = None
    encoding_format: Literal["float", "base64"] = "float"


@router.post("/classify")
async def classify(request: Request) -> Response:
    """SGLang has a route of the same name, which is known by its field names."""
    service = Service.of(request)
    received = await bodies.receive(request, service.options)
    if sglang_scoring.is_meant_by(received.value):
        return await sglang_scoring.classify(request, received)
    body, headers = bodies.checked(received, ClassifyBody, CLASSIFY, service.options)
    card = service.card(body.model, gives="scores")
    prompts, param = await prompts_to_pool(body, card, service)
    scored = await score(request, card, prompts, body, param)
    data = [
        {"index": index, "label": card.label_names[probs.index(max(probs))], "probs": probs, "num_classes": len(probs)}
        for index, probs in enumerate(activated(scores, body.use_activation) for scores in scored.scores)
    ]
    answer = about("classify", card) | {"data": data, "usage": scored.usage}
    return JsonAnswer(answer | {"weight_version": scored.weight_version}, headers)


@router.post("/pooling")
async def pooling(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, PoolingBody, POOLING, service.options)
    card = service.hosted(body.model) if body.model else pooled_by_default(service, body.task)
    prompts, param = await prompts_to_pool(body, card, service)
    if card.gives == "scores":
        check_task(body, card, "classify")
        scored = await score(request, card, prompts, body, param)
        rows, usage = [activated(scores, body.use_activation) for scores in scored.scores], scored.usage
    else:
        check_task(body, card, "embed")
        check_lengths(prompts, card, param)
        rows, usage = await embeddings(request, body, card, prompts, normalize=body.normalize)
    data = [
        {"index": index, "object": "pooling", "data": encoded(row, body.encoding_format)}
        for index, row in enumerate(rows)
    ]
    return JsonAnswer(about("pooling", card) | {"data": data, "usage": usage}, headers)


def about(kind: str, card: ModelCard) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": card.name}


def activated(scores: list[float], wanted: bool) -> list[float]:
    """The sigmoid of one score, the softmax of several; as they are unless that is wanted."""
    if not wanted:
        return scores
    if len(scores) == 1:
        (value,) = scores
        return [1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))]
    powers = [math.exp(value - max(scores)) for value in scores]
    return [power / sum(powers) for power in powers]


def pooled_by_default(service: Service, task: str | None) -> ModelCard:
    """The first model that does the task, or any."""
    gives = {"classify": ("scores",), "embed": ("embeddings",)}.get(task or "", ("scores", "embeddings"))
    first = next((card for card in service.catalog().models if card.gives in gives), None)
    if first is None:
        raise invalid(f"no hosted model gives {' or '.join(gives)}", "model")
    return first


def check_task(body: PoolingBody, card: ModelCard, task: str) -> None:
    if card.gives not in ("scores", "embeddings"):
        raise invalid(f"the model {card.name!r} is a {card.role} model; pooling is for scores and embeddings", "model")
    if body.task not in (None, task):
        raise invalid(f"task is {body.task!r}; {card.name!r} is a {card.role} model, whose task is {task!r}", "task")


async def prompts_to_pool(body: ClassifyBody, card: ModelCard, service: Service) -> tuple[list[list[int]], str]:
    """The token ids, and the field that they came from. Raises ApiError."""
    if (body.input is None) == (body.messages is None):
        raise invalid("send either input or messages", "input")
    text = service.texts(card)
    if body.input is not None:
        prompts = await encode(text, body.input, body.add_special_tokens is not False, card, "input")
        return cut(prompts, body, card), "input"
    ids = await in_thread_if(
        True,
        lambda: text.render(
            body.messages or (),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
        ),
    )
    check_ids(ids, card, "messages")
    return cut([ids], body, card), "messages"


def cut(prompts: list[list[int]], body: PoolingCommon, card: ModelCard) -> list[list[int]]:
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompts
    if keep == 0:
        message = "truncate_prompt_tokens is 0; it must be at least 1, or -1 for what fits"
        raise invalid(message, "truncate_prompt_tokens")
    keep = min(card.context, card.max_request_tokens or card.context) if keep == -1 else keep
    return [ids[-keep:] if body.truncation_side == "left" else ids[:keep] for ids in prompts]
