"""vLLM's /score and /rerank: how well two texts go together.

With a reward model it is its score of both as its tokenizer joins them, raw unless `use_activation` is true; with an
embedding model the cosine of their embeddings.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from operator import mul
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.embeddings import embeddings
from ..api.errors import invalid
from ..api.fields import honoured, refused
from ..api.protocol import MAX_PROMPTS, refuse
from ..api.scoring import check_lengths, score
from ..api.service import Service, encode, in_thread_if
from ..api.streaming import JsonAnswer
from ..engine.request import ModelCard
from .vllm_pooling import COMMON, PoolingCommon, about, activated, cut, pooled_by_default

router = APIRouter()

PAIRS: dict[str, fields.Field] = {
    **COMMON,
    "max_tokens_per_query": refused("a text is cut before it is sent", 0),
    "max_tokens_per_doc": refused("a text is cut before it is sent", 0),
    "instruction": refused("the two texts are joined by the tokenizer; write an instruction into them", ""),
    "chat_template_kwargs": refused("the two texts are joined by the tokenizer, not by a template", {}),
}
NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
TEXTS = {name for pair in NAMES for name in pair}
SCORE: dict[str, fields.Field] = {**PAIRS, **honoured(*TEXTS)}
RERANK: dict[str, fields.Field] = {**PAIRS, **honoured("query", "documents", "top_n")}


def texts_of(value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else cast("list[Any]", value) if isinstance(value, list) else []
    if not 0 < len(texts) <= MAX_PROMPTS or not all(isinstance(text, str) for text in texts):
        refuse(f"it must be a string or a list of 1 to {MAX_PROMPTS} strings")
    return texts


Texts = Annotated[list[str], BeforeValidator(texts_of)]


class ScoreBody(PoolingCommon):
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    def pairs(self) -> tuple[list[str], list[str], str]:
        """The first texts, the second ones, and the field that holds these. Raises ApiError."""
        given = self.model_fields_set & TEXTS
        for first, second in NAMES:
            if given == {first, second}:
                return getattr(self, first), getattr(self, second), second
        known = ", or ".join(" and ".join(pair) for pair in NAMES)
        raise invalid(f"send {known}; not {' and '.join(sorted(given)) or 'nothing'}", "text_1")


class RerankBody(PoolingCommon):
    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=0)] = 0  # 0: all


@router.post("/score")
@router.post("/v1/score")
async def score_pairs(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, ScoreBody, SCORE, service.options)
    firsts, seconds, param = body.pairs()
    if len(firsts) not in (1, len(seconds)):
        raise invalid(f"{param} has {len(seconds)} texts; the other has {len(firsts)}, it may have 1 or as many", param)
    card, scores, usage = await compared(request, body, firsts, seconds, param)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return JsonAnswer(about("score", card) | {"data": data, "usage": usage}, headers)


@router.post("/rerank")
@router.post("/v1/rerank")
async def rerank(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, RerankBody, RERANK, service.options)
    card, scores, usage = await compared(request, body, [body.query], body.documents, "documents")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    results = [
        {
            "index": index,
            "document": {"text": body.documents[index], "multi_modal": None},
            "relevance_score": scores[index],
        }
        for index in order
    ]
    answer = {"id": f"score-{uuid.uuid4().hex}", "model": card.name, "usage": usage, "results": results}
    return JsonAnswer(answer, headers)


async def compared(
    request: Request, body: PoolingCommon, firsts: list[str], seconds: list[str], param: str
) -> tuple[ModelCard, list[float], dict[str, Any]]:
    """A score per pair: a reward model's of the two as its tokenizer joins them, or the cosine of two embeddings."""
    service = Service.of(request)
    card = service.hosted(body.model) if body.model else pooled_by_default(service, None)
    text = service.texts(card)
    if card.gives == "scores":
        if card.labels != 1:
            raise invalid(f"{card.name!r} gives {card.labels} scores per text; a pair's score is one", "model")
        pairs = list(zip(firsts * (len(seconds) if len(firsts) == 1 else 1), seconds, strict=True))
        prompts = await in_thread_if(True, lambda: [text.encode_pair(*pair) for pair in pairs])
        scored = await score(request, card, cut(prompts, body, card), body, param)
        return card, [activated(scores, body.use_activation)[0] for scores in scored.scores], scored.usage
    if card.gives != "embeddings":
        raise invalid(f"the model {card.name!r} is a {card.role} model; it compares no texts", "model")
    prompts = cut(await encode(text, [*firsts, *seconds], True, card, param), body, card)
    check_lengths(prompts, card, param)
    vectors, usage = await embeddings(request, body, card, prompts, normalize=body.normalize)
    queries = vectors[: len(firsts)] * (len(seconds) if len(firsts) == 1 else 1)
    return card, [cosine(*pair) for pair in zip(queries, vectors[len(firsts) :], strict=True)], usage


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    length = math.hypot(*first) * math.hypot(*second)
    return sum(map(mul, first, second)) / length if length else 0.0
