"""POST /v1/rlhf/rollout: generates, and judges each sequence as soon as it is finished, while others are written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.request import Request as EngineRequest
from .. import body as bodies
from ..errors import ApiError, invalid
from ..generation import Generation, generate
from ..options import ApiOptions
from ..protocol import GenerationBody
from ..sampling import Length, requests_of
from ..service import Service, in_thread_if
from ..streaming import JsonAnswer, stream, to_json, unless_gone
from ..structured import grammar_of
from . import fields
from .bodies import RolloutBody
from .evaluator import Evaluator
from .groups import Terms
from .prompts import Source, source_of
from .sampled import Rolled, Rollout

router = APIRouter()


@router.post("/v1/rlhf/rollout")
async def create(request: Request) -> Response:
    service, request_id = Service.of(request), request.state.request_id
    body, headers = await bodies.read(request, RolloutBody, fields.ROLLOUT, service.options)
    drawn = sampling_of(body, service.options)
    terms = Terms(service.client, request_id, service.deadline(body), body.priority, body.cache_salt, goes_on=True)
    evaluator = Evaluator(service, body, terms, drawn.temperature or 1.0, also="policy")
    reader, sources = evaluator.reader, sources_of(body)
    prompts = await in_thread_if(True, lambda: [reader.prompt(source) for source in sources])
    length = Length("sampling.max_tokens", drawn.max_tokens)
    grammar = await grammar_of(service, drawn)
    plain = requests_of(
        service, drawn, reader.card, reader.text, prompts, "prompts", length, logprobs=0, grammar=grammar
    )
    requests = [told(one, place) for place, one in enumerate(plain)]
    judged = [
        await evaluator.prompt(source, one.token_ids, longest_of(one))
        for source, one in zip(sources, requests, strict=True)
    ]
    generation = generate(service.client, drawn, reader.text, requests, request_id)
    if "reward" in evaluator.needs:
        service.traffic.scored(evaluator.cards["reward"], len(generation.choices))
    rollout = Rollout(generation, judged)
    shape = RolloutShape(body, evaluator, generation)
    if body.stream:
        return await stream(request, rollout, shape, service.options, headers)
    try:
        finished: list[Rolled] = await unless_gone(request, rollout.all())
    finally:
        rollout.close()
    return await in_thread_if(True, lambda: JsonAnswer(shape.answer(finished), headers))


def sampling_of(body: RolloutBody, options: ApiOptions) -> GenerationBody:
    """What the object `sampling` says, as a body of the routes that write text. Raises ApiError."""
    given = dict(body.sampling)
    try:
        bodies.sort_out(given, fields.SAMPLING, options.ignore_unknown_fields)
        outer = {"n": body.n, "priority": body.priority, "cache_salt": body.cache_salt, "timeout": body.timeout}
        return bodies.validated(GenerationBody, {**given, **{name: value for name, value in outer.items() if value}})
    except ApiError as error:
        raise invalid(f"sampling.{error.message}", f"sampling.{error.param}", error.code) from None


def sources_of(body: RolloutBody) -> list[Source]:
    if (body.prompts is None) == (body.messages is None):
        raise invalid("send either prompts or messages", "prompts")
    if body.messages is not None:
        return [Source(f"messages[{i}]", messages=chat, listed=True) for i, chat in enumerate(body.messages)]
    return [source_of(prompt, f"prompts[{index}]") for index, prompt in enumerate(body.prompts or [])]


def longest_of(request: EngineRequest) -> int:
    return request.sampling.max_tokens if request.sampling else 0


def told(request: EngineRequest, place: int) -> EngineRequest:
    """The request that is also told what the policy says of each token, and the distribution it was drawn from.

    Drawn with the seed plus its place among the prompts: with one seed, prompts of a rollout would share their luck.
    """
    assert request.sampling is not None
    seed = (request.sampling.seed + place) % 2**64
    sampling = replace(request.sampling, seed=seed, logprobs_mode="processed", policy_logprobs=True)
    return replace(request, sampling=sampling)


class RolloutShape:
    """The wording of the answer, whole or as events."""

    def __init__(self, body: RolloutBody, evaluator: Evaluator, generation: Generation) -> None:
        self._body, self._evaluator, self._generation = body, evaluator, generation
        self._began = time.perf_counter()

    def answer(self, finished: Sequence[Rolled]) -> dict[str, Any]:
        return {
            "object": "rollout",
            **self._about(),
            "sequences": [self._sequence(rolled) for rolled in finished],
            **self._end(),
        }

    def opening(self) -> str:
        return self._event({"object": "rollout.begin", **self._about()})

    def changes(self, news: Sequence[Rolled]) -> str:
        return "".join(self._event({"object": "rollout.sequence", **self._sequence(rolled)}) for rolled in news)

    def closing(self) -> str:
        return self._event({"object": "rollout.end", **self._end()})

    def _event(self, content: dict[str, Any]) -> str:
        return f"data: {to_json(content)}\n\n"

    def _about(self) -> dict[str, Any]:
        """Of all that the rollout will say."""
        return {
            "models": {part: card.name for part, card in self._evaluator.cards.items()},
            "prompt_token_ids": [part.request.token_ids for part in self._generation.parts],
        }

    def _sequence(self, rolled: Rolled) -> dict[str, Any]:
        choice, ids = rolled.choice, rolled.delta.token_ids
        aborted = choice.stop_reason == "abort"
        return {
            "prompt_index": rolled.prompt_index,
            "sample_index": rolled.sample_index,
            "token_ids": ids,
            "text": rolled.delta.text,
            "finish_reason": "abort" if aborted else choice.finish_reason,
            "stop_reason": None if aborted else choice.stop_reason,
            "weight_spans": choice.weight_spans(),
            "weight_versions": rolled.judgement.weight_versions,
            **rolled.judgement.shown(self._body),
            **({"error": rolled.error.body()["error"]} if rolled.error else {}),
        }

    def _end(self) -> dict[str, Any]:
        usage = self._generation.usage()
        counts = self._evaluator.usage(usage["prompt_tokens"], usage["completion_tokens"])
        total = round(1000 * (time.perf_counter() - self._began), 3)
        return {
            "usage": {**counts, "prompt_tokens_details": usage["prompt_tokens_details"]},
            "timing_ms": {**self._evaluator.milliseconds(), "total": total},
        }
