"""Log-probabilities in the three shapes clients know: chat's, completions', and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.request import Logprobs
from ..text.text import Text

FLOOR = -9999.0  # JSON has no -inf


def finite(value: float) -> float:
    return value if value > FLOOR else FLOOR


@dataclass(frozen=True, slots=True)
class Wording:
    """How a token is written in an answer."""

    text: Text
    as_ids: bool  # "token_id:17", which no two tokens share

    def token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.text.token_text(token_id)

    def entry(self, token_id: int, value: float) -> dict[str, Any]:
        return {
            "token": self.token(token_id),
            "logprob": finite(value),
            "bytes": list(self.text.token_bytes(token_id)),
        }


def chat(wording: Wording, ids: Sequence[int], logprobs: Logprobs) -> dict[str, Any]:
    content = [wording.entry(token_id, value) for token_id, value in zip(ids, logprobs.values, strict=True)]
    for index, entry in enumerate(content):
        top = zip(logprobs.top_ids[index], logprobs.top_values[index], strict=True) if logprobs.top_ids else ()
        entry["top_logprobs"] = [wording.entry(token_id, value) for token_id, value in top]
    return {"content": content, "refusal": None}


def completion(wording: Wording, ids: Sequence[int], logprobs: Logprobs, offsets: Sequence[int]) -> dict[str, Any]:
    tops: list[dict[str, float]] = []
    for index, (token_id, value) in enumerate(zip(ids, logprobs.values, strict=True)):
        top = zip(logprobs.top_ids[index], logprobs.top_values[index], strict=True) if logprobs.top_ids else ()
        tops.append({wording.token(token_id): finite(value), **{wording.token(i): finite(v) for i, v in top}})
    return {
        "tokens": [wording.token(token_id) for token_id in ids],
        "token_logprobs": [finite(value) for value in logprobs.values],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def echoed(wording: Wording, ids: Sequence[int], logprobs: Logprobs, offsets: Sequence[int], k: int) -> dict[str, Any]:
    """A prompt's tokens in the shape of `completion`, with the `k` most likely beside each. Nothing precedes the
    first, so it has no log-probability."""
    likely = Logprobs(
        logprobs.values,
        logprobs.ranks,
        [top[:k] for top in logprobs.top_ids],
        [top[:k] for top in logprobs.top_values],
    )
    first = {"tokens": [wording.token(ids[0])], "token_logprobs": [None], "top_logprobs": [None]}
    return joined({**first, "text_offset": [offsets[0]]}, completion(wording, ids[1:], likely, offsets[1:]))


def joined(first: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {name: first[name] + more[name] for name in first}


def prompt(wording: Wording, ids: Sequence[int], logprobs: Logprobs, k: int) -> list[dict[str, Any] | None]:
    """Per prompt token: itself, then the `k` most likely ones, by id. Nothing precedes the first."""
    entries: list[dict[str, Any] | None] = [None]
    for index, (token_id, value) in enumerate(zip(ids[1:], logprobs.values, strict=True)):
        ranked = {token_id: (logprobs.ranks[index], value)}
        for rank, likely in enumerate(logprobs.top_ids[index][:k] if logprobs.top_ids else (), 1):
            ranked.setdefault(likely, (rank, logprobs.top_values[index][rank - 1]))
        entries.append(
            {
                str(i): {"logprob": finite(v), "rank": rank, "decoded_token": wording.text.token_text(i)}
                for i, (rank, v) in ranked.items()
            }
        )
    return entries
