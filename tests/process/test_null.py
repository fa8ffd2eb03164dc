"""`tandem serve null`: the whole stack around a model that computes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from servers import Server

MESSAGES: Any = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Server(tmp_path_factory.mktemp("log"), "null", "paced=null:1,max_model_len=512") as server:
        assert "Null" in server.log
        yield server.base_url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    def ask(model: str, stream: bool) -> Any:
        return client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=40, seed=5, stream=stream, logprobs=True, top_logprobs=2
        )

    whole = ask("null", False)
    choice = whole.choices[0]
    assert whole.usage.completion_tokens == 40 == len(choice.logprobs.content)
    assert choice.finish_reason == "length" and choice.message.content
    for model in ("null", "paced"):
        chunks = [chunk for chunk in ask(model, True) if chunk.choices]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
        assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_string_cuts_the_text(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="null", messages=MESSAGES, max_tokens=200, temperature=0, **more)

    text = ask().choices[0].message.content
    word = text[60:64]
    cut = ask(stop=[word])
    assert cut.choices[0].message.content == text[: text.index(word)]
    assert (cut.choices[0].finish_reason, cut.choices[0].stop_reason) == ("stop", word)


def test_a_paced_stream_has_one_token_per_event(server: str) -> None:
    body = {"model": "paced", "messages": MESSAGES, "max_tokens": 50, "stream": True, "return_token_ids": True}
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    counts = [len(choice.get("token_ids") or []) for event in events for choice in event["choices"]]
    assert sum(counts) == 50 and counts.count(1) > 40


def test_what_it_cannot_do_is_a_400(server: str) -> None:
    body = {"model": "null", "messages": MESSAGES, "logit_bias": {"5": 1}}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logit_bias"
