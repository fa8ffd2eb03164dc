"""How SGLang words what /generate answers: text, ids and `meta_info`, and in each event of a stream all of it again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..api.choices import Choice, Delta, extended
from ..api.generation import Generation, Part
from ..api.logprobs import finite
from ..api.streaming import to_json
from ..engine.request import Logprobs, ModelCard
from ..text.text import Text
from .versions import version_name


@dataclass(frozen=True, slots=True)
class Asked:
    """What one prompt of a request wants to be told."""

    rid: str
    card: ModelCard
    text: Text
    max_new_tokens: int | None
    logprobs: bool
    start: int | None  # the prompt's log-probabilities from that token on; None: none of them
    top: int  # the likeliest tokens beside each
    words: bool  # tokens as text beside their ids


@dataclass(slots=True)
class Said:
    """All that a choice has said."""

    text: str = ""
    ids: list[int] = field(default_factory=list[int])
    logprobs: Logprobs = field(default_factory=Logprobs)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.ids += delta.token_ids
        if delta.logprobs is not None:
            extended(self.logprobs, delta.logprobs, len(delta.token_ids))


class Answers:
    """`asked`: by engine request. `listed`: a whole answer is a list, and events say whose they are."""

    def __init__(self, generation: Generation, asked: Mapping[int, Asked], listed: bool) -> None:
        self._generation, self._asked, self._listed = generation, asked, listed
        self._said = [Said() for _ in generation.choices]
        self._parts = [part for part in generation.parts for _ in part.choices]
        self._began = time.monotonic()

    def answer(self) -> list[dict[str, Any]] | dict[str, Any]:
        answers = [self._answer(choice) for choice in self._generation.choices]
        return answers if self._listed else answers[0]

    def opening(self) -> str:
        return ""

    def changes(self, choices: Iterable[Choice]) -> str:
        events = [self._answer(choice) | ({"index": choice.index} if self._listed else {}) for choice in choices]
        return "".join(f"data: {to_json(event)}\n\n" for event in events)

    def closing(self) -> str:
        return ""

    def _answer(self, choice: Choice) -> dict[str, Any]:
        said, part = self._said[choice.index], self._parts[choice.index]
        said.add(choice.take())
        asked = self._asked[part.request.id]
        meta: dict[str, Any] = {
            "id": asked.rid if part.request.n == 1 else f"{asked.rid}_{choice.number}",
            "finish_reason": finish_reason(choice, asked, said),
            "prompt_tokens": len(part.request.token_ids),
            "weight_version": version_name(asked.card, self._generation.weight_version),
            "completion_tokens": len(said.ids),
            "cached_tokens": part.cached_tokens,
        }
        if asked.logprobs:
            meta |= _logprobs(asked, part, said)
        if choice.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - self._began
        return {"text": said.text, "output_ids": said.ids, "meta_info": meta}


def finish_reason(choice: Choice, asked: Asked, said: Said) -> dict[str, Any] | None:
    if choice.finish_reason is None:
        return None
    if choice.aborted:
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    if choice.finish_reason == "length":
        return {"type": "length", "length": len(said.ids) if asked.max_new_tokens is None else asked.max_new_tokens}
    return {"type": "stop", "matched": said.ids[-1] if choice.stop_reason is None else choice.stop_reason}


def _logprobs(asked: Asked, part: Part, said: Said) -> dict[str, Any]:
    """SGLang has no log-probability of the token at `logprob_start_len`. Here it has one where a token precedes it:
    AReaL reads it as a number."""
    found, start = part.prompt_logprobs, asked.start
    told: dict[str, Any] = {
        "input_token_logprobs": [],
        "output_token_logprobs": _tokens(asked, said.ids, said.logprobs),
    }
    told["output_token_logprobs_length"] = len(said.ids)
    first: list[Any] = []
    if found is not None and start is not None and start < len(part.request.token_ids):
        ids = part.request.token_ids[start:]
        if start == 0:
            first = [_token(asked, None, ids.pop(0))]
        told["input_token_logprobs"] = first + _tokens(asked, ids, found)
        if asked.top:
            told["input_top_logprobs"] = [None] * len(first) + _tops(asked, found)
    if asked.top:
        told.setdefault("input_top_logprobs", [])
        told["output_top_logprobs"] = _tops(asked, said.logprobs)
    return told


def _token(asked: Asked, value: float | None, token_id: int) -> list[Any]:
    return [value, token_id, asked.text.token_text(token_id) if asked.words else None]


def _tokens(asked: Asked, ids: Sequence[int], logprobs: Logprobs) -> list[list[Any]]:
    return [_token(asked, finite(value), token_id) for token_id, value in zip(ids, logprobs.values, strict=True)]


def _tops(asked: Asked, logprobs: Logprobs) -> list[list[list[Any]]]:
    return [
        [_token(asked, finite(value), token_id) for token_id, value in zip(ids, values, strict=True)]
        for ids, values in zip(logprobs.top_ids, logprobs.top_values, strict=True)
    ]
