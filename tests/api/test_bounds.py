"""Every bound: the last value inside is answered, the first one outside is a 400 that names the field and the value."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from tandem.server.api import fields, openai_fields
from tandem.server.api.protocol import ChatBody, CompletionBody, RewardBody

NAN, INF = math.nan, math.inf
HUGE = 2**63

# field: (values that are allowed, values that are refused, fields that go with it, words of the refusals)
ROW = tuple[list[Any], list[Any], dict[str, Any], str]
SHARED: dict[str, ROW] = {
    "temperature": ([0, 2, 0.001], [-0.01, 2.01, NAN, INF, -INF, "1", True, [1]], {}, ""),
    "top_p": ([1, 1e-6], [0, 1.01, -1, NAN], {}, ""),
    "top_k": ([-1, 0, 1, 10**6], [-2, 1.5, "1", HUGE], {}, ""),
    "min_p": ([0, 1], [-0.01, 1.01, NAN], {}, ""),
    "presence_penalty": ([-2, 2], [-2.01, 2.01, NAN], {}, ""),
    "frequency_penalty": ([-2, 2], [-2.01, 2.01, INF], {}, ""),
    "repetition_penalty": ([0.01, 100, 1e-320, 1e308], [0, -1, NAN, INF], {}, ""),
    "n": ([1, 128], [0, 129, 1.0, True, "2"], {}, ""),
    "best_of": ([None, 1, 128], [0, 129, 1.0, True], {}, ""),
    "rank_by": ([None, "reward"], ["", 5, "policy"], {}, ""),
    "max_tokens": ([1, 5], [0, -1, 10**6, HUGE, 2.5, "5"], {}, ""),
    "min_tokens": ([0, 1], [-1, 2], {}, ""),
    "seed": ([-HUGE, 2 * HUGE - 1, 0], [-HUGE - 1, 2 * HUGE, 1.5, "1"], {}, ""),
    "stop": ([[], "x", ["x"] * 16, "x" * 1024], [["x"] * 17, "", ["x", ""], 5, ["x", 5], "x" * 1025], {}, ""),
    "stop_token_ids": ([[], [0], [319]], [[320], [-1], ["1"], [True], 5, [1] * 1025], {}, ""),
    "allowed_token_ids": ([[5], [0, 319]], [[], [320], [-1], [1.0]], {}, ""),
    "logit_bias": (
        [{}, {"0": 100, "319": -100}],
        [{"5": 100.5}, {"5": -100.5}, {"320": 1}, {"-1": 1}, {"x": 1}, {"5": "1"}, {"5": NAN}, {"5": True}, [1]],
        {},
        "",
    ),
    "bad_words": ([[], ["a"] * 128], [["a"] * 129, [""], "a", [5], ["猫" * 600], ["a" * 1025]], {}, ""),
    "prompt_logprobs": ([0, 20], [-1, 21, HUGE, True], {}, ""),
    "logprobs_mode": (["raw", "processed"], ["cooked", 1], {}, ""),
    "truncate_prompt_tokens": ([-1, 1], [-2, 0, 1.5], {}, ""),
    "priority": ([-HUGE, HUGE - 1], [-HUGE - 1, HUGE, 1.5], {}, ""),
    "cache_salt": (["x", "x" * 1024], ["", "x" * 1025, 5], {}, ""),
    "timeout": ([60, 1e9], [0, -1, NAN, "1"], {}, ""),
    "stream_options": ([None], [{"include_usage": True}], {}, "stream: true"),
    "ignore_eos": ([True, False, None], [1, "true"], {}, ""),
    "include_stop_str_in_output": ([True, False], [1, "yes"], {}, ""),
    "skip_special_tokens": ([True, False], [0, "yes"], {}, ""),
    "add_special_tokens": ([True, False, None], [0, "yes"], {}, ""),
    "return_token_ids": ([True, False], [1], {}, ""),
    "return_tokens_as_token_ids": ([True, False], [1], {}, ""),
    "return_weight_spans": ([True, False], [1], {}, ""),
    "stream": ([True, False], [1, "true"], {}, ""),
    "length_penalty": ([1, 1.0], [0.9, 2], {}, "beam search"),
    "spaces_between_special_tokens": ([True], [False], {}, "tokenizer"),
    "request_id": (["x"], [], {}, ""),
    "model": ([None, "policy"], ["", 5], {}, ""),
    "use_beam_search": ([False], [True], {}, "beam search"),
    "structured_outputs": (
        [None, {"regex": "a+"}, {"choice": ["a", "b"]}, {"json": {"type": "null"}}, {"grammar": 'start: "a"'}],
        [
            *({}, {"regex": "a", "choice": ["a"]}, {"regex": 5}, {"regex": ""}, {"regex": "(?=a)"}, {"regexp": "a"}),
            *({"choice": []}, {"choice": [""]}, {"choice": ["a"] * 4097}, {"choice": "a"}, {"grammar": "start: x"}),
            *({"json": []}, {"json": "{"}, {"json": {"not": {}}}, {"json": {"type": "x" * 65_537}}, "a"),
        ],
        {},
        "",
    ),
    "response_format": (
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        ],
        [
            *({"type": "xml"}, "text", {}, {"type": "json_schema"}, {"type": "text", "json_schema": {"name": "n"}}),
            *({"type": "json_schema", "json_schema": schema} for schema in ({"schema": {}}, {"name": "n"}, 5)),
            {"type": "json_schema", "json_schema": {"name": "n" * 65, "schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "wat"}}},
        ],
        {},
        "",
    ),
    "guided_json": ([None], [{"type": "object"}], {}, "structured_outputs replaces it"),
}
CHAT: dict[str, ROW] = SHARED | {
    "top_logprobs": ([0, 20], [-1, 21, True], {"logprobs": True}, ""),
    "logprobs": ([True, False, None], [1, "yes"], {}, ""),
    "max_completion_tokens": ([1, 5], [0, -1, 10**6], {}, ""),
    "messages": (
        [[{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user", "content": "a", "x": {}}]],
        [[], "hi", [5], [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": 5}]],
        {},
        "",
    ),
    "tools": ([[], None], [[{"type": "function", "function": {"name": "f"}}], "f"], {}, ""),
    "tool_choice": (["none", "auto", None], ["required", "any", {"type": "function"}, 5], {}, ""),
    "parallel_tool_calls": ([True, False, None], [1, "no"], {}, ""),
    "chat_template_kwargs": ([{}, {"a": 1}], [[1], {"messages": []}], {}, ""),
    "continue_final_message": ([True], ["x"], {"messages": [{"role": "assistant", "content": "So"}]}, ""),
    "add_generation_prompt": ([True, False, None], [1, "yes"], {}, ""),
    "modalities": ([["text"]], [["text", "audio"]], {}, "text only"),
    "echo": ([False], [True], {}, "not supported"),
    "audio": ([None], [{"voice": "alloy"}], {}, "text only"),
    "chat_template": ([None], ["{{ messages }}"], {}, "never run"),
}
COMPLETIONS: dict[str, ROW] = SHARED | {
    "logprobs": ([0, 20, None], [-1, 21, True], {}, ""),
    "prompt": (
        ["a", "", ["a", "b"], [5, 319], [[5], [6, 7]], [[5]] * 1024],
        [[], [[]], [320], [-1], [5, "a"], [True], [["a"]], 5, ["a"] * 1025, [[5], []]],
        {},
        "",
    ),
    "suffix": (["", None], ["x"], {}, "not supported"),
    "echo": ([True, False, None], [1, "yes"], {}, ""),
}


def test_every_field_that_is_honoured_has_a_row() -> None:
    """And every one that the SDK can send is in a row, ignored below, or refused whatever it holds."""
    assert set(ChatBody.model_fields) <= set(CHAT)
    assert set(CompletionBody.model_fields) <= set(COMPLETIONS)
    for rows, sdk, known in (
        (CHAT, openai_fields.CHAT, fields.CHAT),
        (COMPLETIONS, openai_fields.COMPLETIONS, fields.COMPLETIONS),
    ):
        for name in set(sdk) - set(rows):
            assert known[name].fate != "honoured", name


@pytest.mark.parametrize(
    ("body", "least", "field"),
    [
        (ChatBody, {"messages": [{"role": "user", "content": "a"}] * 4096}, "messages"),
        (RewardBody, {"conversations": [[{"role": "user", "content": "a"}]] * 1024}, "conversations"),
        (RewardBody, {"input": ["a"] * 1024}, "input"),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(65536)}}, "logit_bias"),
    ],
    ids=["messages", "conversations", "input", "logit_bias"],
)
def test_lists_too_long_to_be_worth_a_request(body: type[BaseModel], least: dict[str, Any], field: str) -> None:
    """What a tiny model could not hold anyway, at the parser itself."""
    body.model_validate(least)
    more = least[field] | {"65536": 1} if field == "logit_bias" else least[field] + least[field][:1]
    with pytest.raises(ValidationError, match=r"at most|1 to"):
        body.model_validate(least | {field: more})


REFUSED = [
    (path, name, field)
    for path, table in (("chat/completions", fields.CHAT), ("completions", fields.COMPLETIONS))
    for name, field in table.items()
    if field.fate == "refused"
]


@pytest.mark.parametrize(("path", "name", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_says_why(http: httpx.Client, path: str, name: str, field: fields.Field) -> None:
    base = {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = http.post(f"/v1/{path}", json={**base, "max_tokens": 1, name: {"any": "thing"}})
    assert_refused(answer, name, None, field.reason)
    for value in (None, *field.neutral):
        assert http.post(f"/v1/{path}", json={**base, "max_tokens": 1, name: value}).status_code == 200


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_whatever_an_ignored_field_holds_it_changes_nothing(http: httpx.Client, path: str) -> None:
    table = fields.CHAT if path == "chat/completions" else fields.COMPLETIONS
    ignored = {name: {"any": ["thing"]} for name, field in table.items() if field.fate == "ignored"}
    base = {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    asked = {**base, "max_tokens": 4, "seed": 1}
    plain, more = (http.post(f"/v1/{path}", json=body).json() for body in (asked, {**asked, **ignored}))
    assert ignored and plain["choices"] == more["choices"]


def test_the_largest_body(http: httpx.Client) -> None:
    head, tail = b'{"max_tokens": 1, "prompt": "hi"', b"}"
    for size, status in ((8 * 2**20, 200), (8 * 2**20 + 1, 413)):
        body = head + b" " * (size - len(head) - len(tail)) + tail
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text


def spread(table: dict[str, ROW], column: int) -> list[Any]:
    return [
        pytest.param(field, value, row[2], row[3], id=f"{field}-{i}")
        for field, row in table.items()
        for i, value in enumerate(row[column])
    ]


def send(http: httpx.Client, path: str, base: dict[str, Any], field: str, value: Any, more: Any) -> httpx.Response:
    body = {"max_tokens": 1, **base, **more, field: value}
    if field == "max_completion_tokens":
        del body["max_tokens"]
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def chat(http: httpx.Client, field: str, value: Any, more: dict[str, Any]) -> httpx.Response:
    base = {"messages": [{"role": "user", "content": "hi"}]}
    return send(http, "/v1/chat/completions", base, field, value, more)


def complete(http: httpx.Client, field: str, value: Any, more: dict[str, Any]) -> httpx.Response:
    return send(http, "/v1/completions", {"prompt": "hi"}, field, value, more)


def assert_refused(answer: httpx.Response, field: str, value: Any, words: str) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0].split(".")[0] == field, error
    assert words in error["message"]
    if type(value) in (int, float, bool):
        assert json.dumps(value) in error["message"], error


@pytest.mark.parametrize(("field", "value", "more", "words"), spread(CHAT, 0))
def test_chat_takes(http: httpx.Client, field: str, value: Any, more: dict[str, Any], words: str) -> None:
    answer = chat(http, field, value, more)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("field", "value", "more", "words"), spread(CHAT, 1))
def test_chat_refuses(http: httpx.Client, field: str, value: Any, more: dict[str, Any], words: str) -> None:
    assert_refused(chat(http, field, value, more), field, value, words)


@pytest.mark.parametrize(("field", "value", "more", "words"), spread(COMPLETIONS, 0))
def test_completions_take(http: httpx.Client, field: str, value: Any, more: dict[str, Any], words: str) -> None:
    answer = complete(http, field, value, more)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("field", "value", "more", "words"), spread(COMPLETIONS, 1))
def test_completions_refuse(http: httpx.Client, field: str, value: Any, more: dict[str, Any], words: str) -> None:
    assert_refused(complete(http, field, value, more), field, value, words)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens, 4"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "n": 2}, "n", "must be 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "add_generation"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag", "no such field"),
        ({"max_tokens": 1, "max_completion_tokens": 10**5}, "max_completion_tokens", "100000"),
        ({"temperatur": 1}, "temperatur", "did you mean 'temperature'"),
        ({"max_new_tokens": 1}, "max_new_tokens", "unknown field"),
        ({"guided_json": {}}, "guided_json", "not supported"),
        ({"metadata": {"a": NAN}, "x": 1}, "x", "unknown field 'x'"),
        ({"chat_template_kwargs": {"a": NAN}}, None, "NaN is no JSON number"),
    ],
)
def test_fields_that_do_not_go_together(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = chat(http, "user", "ignored", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"best_of": 2, "n": 3}, "best_of", "at least n, 3"),
        ({"best_of": 2, "stream": True}, "best_of", "stream: true"),
        ({"best_of": 2, "max_tokens": 0, "echo": True}, "best_of", "max_tokens is 0"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "n", "must be 1"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "at most max_tokens, 0"),
        ({"prompt": ["a"] * 33, "best_of": 128}, "best_of", "4224"),
        ({"prompt": ["a"] * 33, "n": 128}, "n", "4224"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
    ],
)
def test_fields_of_completions_that_do_not_go_together(
    http: httpx.Client, body: dict[str, Any], param: str, words: str
) -> None:
    answer = complete(http, "user", "ignored", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_an_echo_may_fill_the_context(http: httpx.Client, context: int) -> None:
    echo = {"prompt": [5] * context, "echo": True}
    assert complete(http, "max_tokens", 0, echo).json()["usage"]["total_tokens"] == context
    assert_refused(complete(http, "max_tokens", 1, echo), "prompt", None, f"holds {context}")
    cut = complete(http, "truncate_prompt_tokens", -1, {**echo, "prompt": [5] * (context + 9), "max_tokens": 0})
    assert cut.json()["usage"]["prompt_tokens"] == context


def test_ignored_fields_are_ignored(http: httpx.Client) -> None:
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low"}
    answer = chat(http, "reasoning_effort", "high", {**ignored, "prompt_cache_key": "k", "parallel_tool_calls": False})
    assert answer.status_code == 200, answer.text


def test_the_whole_context_may_be_used_and_not_a_token_more(http: httpx.Client, context: int) -> None:
    prompt = [5] * (context - 3)
    assert complete(http, "max_tokens", 3, {"prompt": prompt}).status_code == 200
    answer = complete(http, "max_tokens", 4, {"prompt": prompt})
    assert_refused(answer, "max_tokens", 4, f"holds {context}")
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    for length in (context, context + 1, 4 * context):
        answer = complete(http, "prompt", [5] * length, {})
        assert_refused(answer, "prompt", None, f"has {length} tokens")
    assert complete(http, "truncate_prompt_tokens", -1, {"prompt": [5] * (2 * context)}).status_code == 200
    default = complete(http, "max_tokens", None, {"prompt": prompt, "ignore_eos": True}).json()
    assert default["usage"]["completion_tokens"] == 3  # the default of 16 gives way


def test_a_chat_may_fill_what_the_prompt_leaves(http: httpx.Client, context: int) -> None:
    messages = [{"role": "user", "content": "the cat " * (context // 4 - 8)}]
    usage = chat(http, "max_tokens", None, {"messages": messages, "ignore_eos": True}).json()["usage"]
    assert usage["total_tokens"] == context
