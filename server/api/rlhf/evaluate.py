"""POST /v1/rlhf/evaluate: all that PPO needs of finished sequences, in one call."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .. import body as bodies
from ..errors import invalid
from ..sampling import MAX_SEQUENCES
from ..service import Service, in_thread_if
from ..streaming import JsonAnswer, unless_gone
from . import fields
from .bodies import EvaluateBody
from .evaluator import Evaluator, JudgedPrompt
from .groups import Terms, together
from .judgement import Judgement
from .prompts import Source

MANY = 1 << 16  # numbers; writing so many takes 20 ms

router = APIRouter()


@router.post("/v1/rlhf/evaluate")
async def create(request: Request) -> Response:
    service = Service.of(request)
    began = time.perf_counter()
    body, headers = await bodies.read(request, EvaluateBody, fields.EVALUATE, service.options)
    if not body.want:
        raise invalid("want is empty: name what is to be computed", "want")
    count = sum(len(group.completions) for group in body.groups)
    if count > MAX_SEQUENCES:
        raise invalid(f"groups have {count} completions; one request may have {MAX_SEQUENCES}", "groups")
    terms = Terms(service.client, request.state.request_id, service.deadline(body), body.priority, body.cache_salt)
    evaluator = Evaluator(service, body, terms, body.temperature)
    if "reward" in evaluator.needs:
        service.traffic.scored(evaluator.cards["reward"], count)
    sources = [Source.of(group, f"groups[{index}]", may_be_both=True) for index, group in enumerate(body.groups)]
    reader = evaluator.reader
    prompts = await in_thread_if(True, lambda: [reader.prompt(source) for source in sources])
    longest = [max(len(one.token_ids) for one in group.completions) for group in body.groups]
    judged: list[JudgedPrompt] = [
        await evaluator.prompt(source, ids, length)
        for source, ids, length in zip(sources, prompts, longest, strict=True)
    ]
    works = [
        prompt.judge(one.token_ids, one.finish_reason, f"groups[{i}].completions[{j}].token_ids")
        for i, (prompt, group) in enumerate(zip(judged, body.groups, strict=True))
        for j, one in enumerate(group.completions)
    ]
    judgements: list[Judgement] = await unless_gone(request, together(works))
    versions = newest(judgements)
    answers = iter(judgements)
    completion_tokens = sum(len(one.token_ids) for group in body.groups for one in group.completions)

    def work() -> Response:
        answer = {
            "object": "evaluation",
            "groups": [
                {"completions": [entry(next(answers), body, versions) for _ in group.completions]}
                for group in body.groups
            ],
            "models": {part: card.name for part, card in evaluator.cards.items()},
            "weight_versions": versions,
            "usage": evaluator.usage(sum(map(len, prompts)), completion_tokens),
            "timing_ms": {**evaluator.milliseconds(), "total": round(1000 * (time.perf_counter() - began), 3)},
        }
        return JsonAnswer(answer, headers)

    return await in_thread_if(completion_tokens * len(body.want) > MANY, work)


def newest(judgements: list[Judgement]) -> dict[Any, int]:
    """By part."""
    versions: dict[Any, int] = {}
    for judgement in judgements:
        for part, version in judgement.weight_versions.items():
            versions[part] = max(version, versions.get(part, version))
    return versions


def entry(judgement: Judgement, body: EvaluateBody, versions: dict[Any, int]) -> dict[str, Any]:
    """One that was judged before weights changed says by which."""
    own = judgement.weight_versions
    return {**judgement.shown(body), **({"weight_versions": own} if own != versions else {})}
