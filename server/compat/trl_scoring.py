"""TRL's /get_sequence_logprobs/ (up to 1.10): a teacher's log-probabilities of what follows a prompt."""

from __future__ import annotations

import math
from array import array
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.errors import bug, invalid
from ..api.fields import honoured
from ..api.generation import Generation, Part
from ..api.logprobs import finite
from ..api.protocol import INT64, MAX_PROMPTS, Common, Ids, Scale, refuse
from ..api.scoring import check_lengths
from ..api.service import Service, check_ids, in_thread_if
from ..api.streaming import JsonAnswer, whole
from ..engine.request import Logprobs, ModelCard

router = APIRouter()

SEQUENCES: dict[str, fields.Field] = {
    **honoured("model", "sequences", "prompt_lengths", "top_logprobs", "temperature", "response_format"),
    **honoured("priority", "cache_salt", "timeout"),
}


def sequences_of(value: object) -> list[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPTS:  # pyright: ignore[reportUnknownArgumentType]
        refuse(f"it must be a list of 1 to {MAX_PROMPTS} lists of token ids")
    return value  # pyright: ignore[reportUnknownVariableType]


class SequencesBody(Common):
    sequences: Annotated[list[Ids], BeforeValidator(sequences_of)]
    prompt_lengths: Annotated[Ids, Field(max_length=MAX_PROMPTS)]
    top_logprobs: Annotated[int, Field(ge=0, lt=INT64)] = 100
    temperature: Scale = 1.0
    response_format: Literal["json", "binary"] = "json"


@router.post("/get_sequence_logprobs/")
async def score(request: Request) -> Response:
    """TRL's server hands `temperature` to vLLM, which leaves log-probabilities as they are; here they are those of
    logits / temperature, which its trainers compare them with."""
    service = Service.of(request)
    body, headers = await bodies.read(request, SequencesBody, SEQUENCES, service.options)
    card = service.card(body.model, gives="text")
    check(body, card, service.options.max_logprobs)
    deadline = service.deadline(body)
    parts: list[Part] = []
    for ids, length in zip(body.sequences, body.prompt_lengths, strict=True):
        asked = service.request(card, ids, body, deadline, "prompt_logprobs")
        first, likely = max(length - 1, 0), body.top_logprobs
        asked = replace(asked, prompt_logprobs=likely, first_needed_row=first, temperature=body.temperature)
        parts.append(Part(asked, []))
    generation = Generation(service.client, parts, request.state.request_id)
    await whole(request, generation)
    columns = [columns_of(part, request.state.request_id) for part in parts]
    wording = packed if body.response_format == "binary" else listed
    return JsonAnswer(await in_thread_if(True, lambda: wording(body, columns)), headers)


def check(body: SequencesBody, card: ModelCard, most: int) -> None:
    if len(body.sequences) != len(body.prompt_lengths):
        message = f"prompt_lengths has {len(body.prompt_lengths)} entries; there are {len(body.sequences)} sequences"
        raise invalid(message, "prompt_lengths")
    if body.top_logprobs > most:
        message = f"top_logprobs is {body.top_logprobs}; it must be at most {most} (--max-logprobs)"
        raise invalid(message, "top_logprobs")
    for index, (ids, length) in enumerate(zip(body.sequences, body.prompt_lengths, strict=True)):
        if not 0 <= length <= len(ids):
            message = f"prompt_lengths[{index}] is {length}; it must be 0 to {len(ids)}, the sequence's length"
            raise invalid(message, "prompt_lengths")
        check_ids(ids, card, "sequences")
    check_lengths(body.sequences, card, "sequences")


def columns_of(part: Part, request_id: str) -> Logprobs:
    """Of the tokens from `first_needed_row` + 1 on."""
    found, request = part.prompt_logprobs, part.request
    expected = len(request.token_ids) - 1 - request.needed_row
    if expected and (found is None or len(found.values) != expected):
        raise bug(request_id, f"{expected} log-probabilities were to be told")
    return found or Logprobs()


def _rows(body: SequencesBody, index: int, found: Logprobs) -> list[list[tuple[float, int]]]:
    """Of each token behind the prompt: (log-probability, id) of the likeliest and of itself. Nothing precedes the
    first token of a sequence, so it has none."""
    length = body.prompt_lengths[index]
    rows: list[list[tuple[float, int]]] = [] if length else [[]]
    for place, token_id in enumerate(body.sequences[index][max(length, 1) :]):
        likely = list(zip(found.top_values[place], found.top_ids[place], strict=True)) if found.top_ids else []
        own = (found.values[place], token_id)
        rows.append(likely if token_id in (number for _, number in likely) else [*likely, own])
    return rows


def listed(body: SequencesBody, columns: Sequence[Logprobs]) -> dict[str, Any]:
    rows = [_rows(body, index, found) for index, found in enumerate(columns)]
    logprobs = [[[finite(value) for value, _ in row] for row in sequence] for sequence in rows]
    ids = [[[token_id for _, token_id in row] for row in sequence] for sequence in rows]
    return {"logprobs": logprobs, "logprob_token_ids": ids}


def packed(body: SequencesBody, columns: Sequence[Logprobs]) -> dict[str, Any]:
    """float32 and int32 arrays [sequence, place, k] and [sequence, place, 1], filled up with -inf and 0."""
    k = body.top_logprobs
    lengths = [len(ids) - length for ids, length in zip(body.sequences, body.prompt_lengths, strict=True)]
    longest = max(lengths)
    likely: list[float] = []
    likely_ids: list[int] = []
    actual: list[float] = []
    actual_ids: list[int] = []
    for index, found in enumerate(columns):
        rows = _rows(body, index, found)
        for place in range(longest):
            row = (rows[place] if place < len(rows) else [])[:k]
            likely += [value for value, _ in row] + [-math.inf] * (k - len(row))
            likely_ids += [token_id for _, token_id in row] + [0] * (k - len(row))
            told = place < len(rows) and bool(rows[place])
            at = place if body.prompt_lengths[index] else place - 1
            actual.append(found.values[at] if told else -math.inf)
            actual_ids.append(body.sequences[index][body.prompt_lengths[index] + place] if told else 0)
    return {
        "logprobs_b64": _base64("f", likely),
        "token_ids_b64": _base64("i", likely_ids),
        "actual_logprobs_b64": _base64("f", actual),
        "actual_token_ids_b64": _base64("i", actual_ids),
        "shape": [len(columns), longest, k],
        "completion_lengths": lengths,
    }


def _base64(kind: str, values: Iterable[float]) -> str:
    return b64encode(array(kind, values).tobytes()).decode()
