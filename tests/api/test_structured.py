"""response_format and structured_outputs over HTTP and through the SDK."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the answer?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": -9, "maximum": 9}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
LONG = 400  # tokens: an answer of random weights takes its time over white space


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": USER, "max_tokens": LONG, "seed": 1} | fields)


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "hi", "max_tokens": LONG, "seed": 1} | fields)


def refusal(answer: httpx.Response, param: str) -> str:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    return error["message"]


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    score: int = Field(ge=0, le=10)
    reasons: list[Literal["short", "long", "wrong"]] = Field(max_length=2)


def test_the_sdk_parses_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="policy", messages=USER, response_format=Verdict, max_completion_tokens=LONG, seed=4
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Verdict)
    assert choice.message.content is not None
    assert choice.message.parsed == Verdict.model_validate_json(choice.message.content)


def test_choices_differ_and_all_keep_to_the_schema(http: httpx.Client) -> None:
    answer = chat(http, response_format=FORMAT, n=5).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1
    again = chat(http, response_format=FORMAT, n=5).json()
    assert [choice["message"]["content"] for choice in again["choices"]] == texts


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "policy", "messages": USER, "max_tokens": LONG, "seed": 5}
    asked["response_format"] = FORMAT
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"


def test_a_json_object(http: httpx.Client) -> None:
    """It may be long: what is there is the beginning of an object, and the whole of one where it ended."""
    (choice,) = complete(http, response_format={"type": "json_object"}, temperature=0, max_tokens=100).json()["choices"]
    assert choice["text"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": r"[a-f]{3}-\d{2}"}, r"[a-f]{3}-\d{2}"),
        ({"choice": ["yes", "no", "naïve 😀"]}, "yes|no|naïve 😀"),
        ({"grammar": 'start: "<" /[xyz]/ ">"'}, "<[xyz]>"),
        ({"grammar": 'root ::= "<" [xyz] ">"'}, "<[xyz]>"),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
        ({"json": '{"enum": [1, "two"]}'}, '1|"two"'),
    ],
)
def test_structured_outputs(http: httpx.Client, wanted: dict[str, Any], pattern: str) -> None:
    found = [
        choice["text"]
        for seed in (1, 2)
        for choice in complete(http, structured_outputs=wanted, seed=seed).json()["choices"]
    ]
    found.append(chat(http, structured_outputs=wanted).json()["choices"][0]["message"]["content"])
    assert all(re.fullmatch(pattern, text) for text in found), found


def test_prompts_of_one_request_each_follow_it(http: httpx.Client) -> None:
    answer = complete(http, prompt=[[5], [6], [7, 8]], n=2, structured_outputs={"choice": ["a", "b"]}).json()
    assert len(answer["choices"]) == 6
    assert {choice["text"] for choice in answer["choices"]} <= {"a", "b"}


def test_log_probabilities_are_the_models(http: httpx.Client) -> None:
    """`raw` knows nothing of the grammar; `processed` is of what could be drawn."""
    asked: dict[str, Any] = {"structured_outputs": {"choice": ["a"]}, "logprobs": 3}
    raw = complete(http, **asked).json()["choices"][0]["logprobs"]
    processed = complete(http, **asked, logprobs_mode="processed").json()["choices"][0]["logprobs"]
    assert raw["tokens"] == processed["tokens"] and raw["token_logprobs"][0] < -0.1
    assert processed["token_logprobs"] == [0.0, 0.0]
    assert [len(top) for top in processed["top_logprobs"]] == [1, 1]


def test_an_unsupported_keyword_is_named(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    assert "uniqueItems" in refusal(chat(http, response_format=wanted), "response_format.json_schema.schema")
    message = refusal(complete(http, structured_outputs={"json": schema}), "structured_outputs.json")
    assert "uniqueItems" in message


def test_what_does_not_go_together(http: httpx.Client) -> None:
    choice = {"choice": ["yes", "no"]}
    both = chat(http, structured_outputs=choice, response_format={"type": "json_object"})
    assert "response_format" in refusal(both, "structured_outputs")
    assert chat(http, structured_outputs=choice, response_format={"type": "text"}).status_code == 200
    assert "end-of-text" in refusal(chat(http, structured_outputs=choice, ignore_eos=True), "ignore_eos")
    empty = chat(http, structured_outputs=choice, allowed_token_ids=[3])
    assert "the grammar" in refusal(empty, "allowed_token_ids")
    assert "the grammar" in refusal(chat(http, structured_outputs=choice, min_tokens=300), "allowed_token_ids")


def test_a_large_grammar_is_refused_before_it_is_built(http: httpx.Client) -> None:
    message = refusal(complete(http, structured_outputs={"regex": "a" * 70_000}), "structured_outputs.regex")
    assert "70000" in message and "65536" in message
    message = refusal(complete(http, structured_outputs={"regex": "(a{1000}){1000}"}), "structured_outputs.regex")
    assert "too many expressions" in message


def test_a_stream_tells_what_left_no_token(http: httpx.Client) -> None:
    """After the first byte an error is an event."""
    body = {"structured_outputs": {"regex": "ab"}, "bad_words": ["b"], "stream": True}
    answer = chat(http, **body)
    assert "the grammar" in answer.text
    assert answer.status_code == 400 or answer.text.rstrip().endswith("data: [DONE]")
