"""Forced calls on random weights: whatever the model likes, the call is JSON of the function's schema."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from servers import Server

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools | tojson }}"
TEMPLATES = {  # what tells the format stands in comments: these models know none
    "hermes": "{# <tool_call> #}" + TURNS + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "llama3": "{# <|python_tag|> #}" + TURNS,
    "mistral": "{# [TOOL_CALLS][ #}" + TURNS,
    "mistral-v11": "{# [TOOL_CALLS]f[ARGS]{} #}" + TURNS,
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "São Paulo", "北京"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days", "place"],
    "$defs": {"place": {"type": "object", "properties": {"north": {"type": "null"}}, "required": ["north"]}},
}
WEATHER["$defs"]["place"]["additionalProperties"] = False
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
]
USER: Any = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def client(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """One model under every format. For Mistral's two of the special tokens are its markers."""
    directory = tmp_path_factory.mktemp("formats")
    marked = directory / "marked"
    shutil.copytree(policy, marked)
    for file in marked.glob("tokenizer*.json"):
        text = file.read_text("utf-8").replace("<|user|>", "[TOOL_CALLS]").replace("<|system|>", "[ARGS]")
        file.write_text(text, "utf-8")
    words: list[str] = []
    for name, template in TEMPLATES.items():
        (directory / f"{name}.jinja").write_text(template)
        path = marked if name.startswith("mistral") else policy
        words.append(f"{name}={path},chat_template={directory / name}.jinja")
    words[0] += ",reasoning_parser=qwen3"
    with (
        Server(directory, *words) as server,
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def assert_calls(calls: Any, known: set[str], id_pattern: str) -> None:
    assert calls
    for call in calls:
        assert call.function.name in known and re.fullmatch(id_pattern, call.id)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_forced_call_is_valid(client: openai.OpenAI, model: str) -> None:
    ids = "[a-zA-Z0-9]{9}" if model.startswith("mistral") else "call_[a-zA-Z0-9]{24}"
    asked: dict[str, Any] = {"model": model, "messages": USER, "tools": TOOLS, "n": 4, "seed": 5}
    for choice, known in (("required", set(SCHEMAS)), (named("weather"), {"weather"}), (named("now"), {"now"})):
        answer = client.chat.completions.create(tool_choice=choice, parallel_tool_calls=False, **asked)
        for one in answer.choices:
            assert (one.finish_reason, one.message.content) == ("tool_calls", None)
            assert len(one.message.tool_calls or []) == 1
            assert_calls(one.message.tool_calls, known, ids)


@pytest.mark.parametrize("model", TEMPLATES)
def test_required_calls_may_be_several(client: openai.OpenAI, model: str) -> None:
    """Those that were ended; random weights may want more than the answer has room for."""
    answer = client.chat.completions.create(
        model=model, messages=USER, tools=TOOLS[1:], tool_choice="required", n=8, seed=1, max_tokens=400
    )
    numbers = [len(one.message.tool_calls or []) for one in answer.choices if one.finish_reason == "tool_calls"]
    assert max(numbers) > 1
    for one in answer.choices:
        if one.finish_reason == "tool_calls":
            assert_calls(one.message.tool_calls, {"now"}, ".*")
            assert one.message.content is None


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_forced_call_is_streamed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "messages": USER,
        "tools": TOOLS,
        "tool_choice": named("weather"),
        "seed": 2,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    for _ in range(20):  # on a busy machine tokens that wait for their reader come as one
        with client.chat.completions.stream(**asked) as stream:
            deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            streamed = stream.get_final_completion().choices[0]
        if len(deltas) > 3:
            break
    assert len(deltas) > 3 and streamed.finish_reason == whole.finish_reason == "tool_calls"
    (call,), (other,) = streamed.message.tool_calls or [], whole.message.tool_calls or []
    assert call.function.arguments == other.function.arguments
    assert_calls([call], {"weather"}, ".*")


def test_forced_calls_beside_free_answers(client: openai.OpenAI) -> None:
    """A free answer of the same seed is the same, forced ones in the batch or not."""
    asked: dict[str, Any] = {"model": "llama3", "messages": USER, "max_tokens": 30, "seed": 3, "tools": TOOLS}
    before = client.chat.completions.create(**asked).choices[0].message
    client.chat.completions.create(**asked, n=4, tool_choice="required", parallel_tool_calls=False)
    after = client.chat.completions.create(**asked).choices[0].message
    assert before == after and before.content


SHAPE: Any = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["hermes", "llama3"])
def test_a_structured_answer_or_a_call(client: openai.OpenAI, model: str) -> None:
    """Where calls are free and the answer's form is not, an answer is one of them; where they are forced, a call."""
    asked: dict[str, Any] = {"model": model, "messages": USER, "tools": TOOLS, "seed": 1, "n": 8}
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": SHAPE}}
    for one in client.chat.completions.create(**asked, parallel_tool_calls=False).choices:
        if one.message.tool_calls:
            assert_calls(one.message.tool_calls, set(SCHEMAS), ".*")
        else:
            jsonschema.validate(json.loads(one.message.content or ""), SHAPE)
    for one in client.chat.completions.create(**asked, tool_choice=named("now")).choices:
        assert_calls(one.message.tool_calls, {"now"}, ".*")


def test_a_structured_answer_behind_thinking(client: openai.OpenAI) -> None:
    """Random weights end no thinking; who begins none gives the answer at once."""
    answer = client.chat.completions.create(
        model="hermes",
        messages=USER,
        n=16,
        seed=1,
        max_tokens=40,
        extra_body={
            "structured_outputs": {"choice": ["yes", "no"]},
            "chat_template_kwargs": {"enable_thinking": True},
        },
    )
    ended = [one.message for one in answer.choices if one.finish_reason == "stop"]
    assert ended and {message.content for message in ended} <= {"yes", "no"}
    for one in answer.choices:
        if one.finish_reason == "length":
            assert one.message.content is None and getattr(one.message, "reasoning_content", None)


def test_an_answer_that_never_ends_cannot_be_a_call(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="hermes", messages=USER, tools=TOOLS, tool_choice="required", extra_body={"ignore_eos": True}
        )
    assert refused.value.param == "ignore_eos"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "object", "properties": {"x": {"not": {}}}}, "not supported: not"),
        ({"type": "object", "properties": {"x": {"$ref": "#/$defs/none"}}}, "/$defs/none"),
        ({"type": "object", "properties": {"x": {"pattern": "(?=a)"}}}, "look"),
        ({"type": "object", "properties": {"x": {"enum": []}}, "required": ["x"]}, "unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_named(client: openai.OpenAI, parameters: Any, words: str) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "bad", "parameters": parameters}}]
    for choice in ("required", named("bad")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="hermes", messages=USER, tools=tools, tool_choice=choice)  # type: ignore[arg-type]
        assert refused.value.param == "tools[2].function.parameters" and words in refused.value.message
    answer = client.chat.completions.create(model="hermes", messages=USER, tools=tools, tool_choice=named("now"))
    assert answer.choices[0].message.tool_calls
