"""Requests to a dialect's routes, and what transformers says they should give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import torch

Logits = Callable[[list[int]], torch.Tensor]  # [T, V]: what follows each token
IDS = [1, 70, 75, 80, 71, 72, 90, 101, 33, 40, 57, 300]


def post(http: httpx.Client, path: str, **body: object) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str, **body: object) -> list[dict[str, Any]]:
    answer = http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    *told, done = [event for event in answer.text.strip().split("\n\n") if not event.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in told]


def greedy(logits: Logits, ids: list[int], count: int) -> list[int]:
    drawn: list[int] = []
    for _ in range(count):
        drawn.append(int(logits(ids + drawn)[-1].argmax()))
    return drawn


def logprob(logits: Logits, ids: list[int], place: int, temperature: float = 1.0) -> float:
    """Of the token at `place`, given those before it."""
    return (logits(ids)[place - 1] / temperature).log_softmax(-1)[ids[place]].item()
