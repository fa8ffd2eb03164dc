"""That the check of shapes, which looks at every answer in these tests, sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ValidationError
from shapes import check

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
COMPLETION = {"prompt": "The cat", "max_tokens": 2, "logprobs": 2, "echo": True}


@pytest.mark.parametrize(
    ("path", "body", "model", "spoil"),
    [
        ("chat/completions", CHAT, ChatCompletion, lambda a: a.update(created=str(a["created"]))),
        ("chat/completions", CHAT, ChatCompletion, lambda a: a["choices"][0].update(finish_reason="abort")),
        ("chat/completions", CHAT, ChatCompletion, lambda a: a["choices"][0]["message"].pop("role")),
        ("chat/completions", CHAT, ChatCompletion, lambda a: a["choices"][0].update(speed=9)),
        ("chat/completions", CHAT, ChatCompletion, lambda a: a["usage"]["prompt_tokens_details"].update(x=1)),
        (
            "chat/completions",
            CHAT,
            ChatCompletion,
            lambda a: a["choices"][0]["logprobs"]["content"][0].update(bytes="a"),
        ),
        ("completions", COMPLETION, Completion, lambda a: a.update(weight=1)),
        ("completions", COMPLETION, Completion, lambda a: a["choices"][0].update(text=None)),
        ("completions", COMPLETION, Completion, lambda a: a["choices"][0]["logprobs"]["text_offset"].append("1")),
    ],
)
def test_a_spoilt_answer_is_seen(
    http: httpx.Client, path: str, body: dict[str, Any], model: type[BaseModel], spoil: Callable[[Any], object]
) -> None:
    answer = http.post(f"/v1/{path}", json=body).json()
    check(model, answer)
    spoil(answer)
    with pytest.raises((ValidationError, AssertionError)):
        check(model, answer)


def test_every_answer_says_its_weights_and_what_was_cached(http: httpx.Client) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
        answer = http.post(f"/v1/{path}", json=body, headers={"x-request-id": "shape-1"})
        assert answer.headers["x-request-id"] == "shape-1"
        assert answer.json()["weight_version"] == 0
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    assert http.post("/v1/rewards", json={"input": "a"}).json()["weight_version"] == 0
