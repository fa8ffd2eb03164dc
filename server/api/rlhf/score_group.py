"""POST /v1/rlhf/score_group: one prompt and its completions, ranked by a reward model that computes the prompt once."""

from __future__ import annotations

import uuid
from itertools import combinations
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .. import body as bodies
from ..errors import invalid
from ..scoring import reward_model
from ..service import Service, in_thread_if
from ..streaming import JsonAnswer, unless_gone
from . import fields
from .bodies import ScoreGroupBody
from .evaluation import normalised, preference, ranking_of
from .groups import PromptGroup, Terms, check_length, together
from .prompts import Reader, Source, answer_of

MAX_PAIRED = 128  # completions; these make 8,128 pairs

router = APIRouter()


@router.post("/v1/rlhf/score_group")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, ScoreGroupBody, fields.SCORE_GROUP, service.options)
    card = reward_model(service, body.model)
    if body.pairwise and len(body.completions) > MAX_PAIRED:
        count = len(body.completions)
        raise invalid(f"pairwise is for at most {MAX_PAIRED} completions, not {count}", "pairwise")
    source = Source.of(body, "")
    answers = [answer_of(one, f"completions[{index}]") for index, one in enumerate(body.completions)]
    reader = Reader(card, service.texts(card), body.add_special_tokens, body.chat_template_kwargs)
    group = await in_thread_if(True, lambda: reader.group(source, answers))
    for index, member in enumerate(group.members):
        check_length(card, len(group.prompt), len(member), f"completions[{index}]")
    terms = Terms(service.client, request.state.request_id, service.deadline(body), body.priority, body.cache_salt)
    service.traffic.scored(card, len(group.members))
    prompt = PromptGroup(terms, card, group.prompt, max(map(len, group.members)))
    found = await unless_gone(request, together(prompt.run(member, "score") for member in group.members))
    raw = [one.score for one in found if one.score is not None]
    answer = {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "score_group",
        "model": card.name,
        "weight_version": max(one.weight_version for one in found),
        "scores": [normalised(score, card) for score in raw] if body.normalize else raw,
        "raw_scores": raw,
        "ranking": ranking_of(raw),
        "pooled_index": [one.pooled_index for one in found],
        **({"pairs": pairs_of(raw)} if body.pairwise else {}),
        "usage": {
            "prompt_tokens": len(group.prompt),
            "completion_tokens": sum(map(len, group.members)),
            "total_tokens": len(group.prompt) + sum(map(len, group.members)),
            "prefill_tokens": group.tokens if prompt.shares else group.tokens_unshared,
            "prefill_tokens_unshared": group.tokens_unshared,
        },
    }
    return JsonAnswer(answer, headers)


def pairs_of(scores: list[float]) -> list[dict[str, Any]]:
    """Of raw scores: a reward model is trained on their differences."""
    return [
        {"i": i, "j": j, "p_i_over_j": preference(scores[i], scores[j])} for i, j in combinations(range(len(scores)), 2)
    ]
