"""What requests say about tools: 400s that name the place, and what reaches the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import vocabularies

from tandem.server.api.errors import ApiError
from tandem.server.api.protocol import ChatBody
from tandem.server.api.tools import Calling, calling_of
from tandem.server.text.text import Text

F: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**F, **function}}


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}
    return http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"type": "custom", "custom": {"name": "f"}}, "tools[1].type", "'function'"),
        ({}, "tools[1].type", "null"),
        ({"type": "function"}, "tools[1].function", "missing"),
        ({"type": "function", "function": "f"}, "tools[1].function", "object"),
        ({"type": "function", "function": {}}, "tools[1].function.name", "null"),
        (tool(name="a b"), "tools[1].function.name", '"a b"'),
        (tool(name="f\n"), "tools[1].function.name", "a-z"),
        (tool(name="x" * 65), "tools[1].function.name", "1 to 64"),
        (tool(description=5), "tools[1].function.description", "5"),
        (tool(strict="yes"), "tools[1].function.strict", "true or false"),
        (tool(parameters="x: int"), "tools[1].function.parameters", "object"),
        (tool(parameters={"type": "array"}), "tools[1].function.parameters.type", '"array"'),
        (tool(parameters={"type": ["object"]}), "tools[1].function.parameters.type", "'object'"),
        (tool(parameters={"properties": ["x"]}), "tools[1].function.parameters.properties", "object"),
        (tool(parameters={"required": "x"}), "tools[1].function.parameters.required", "strings"),
    ],
)
def test_a_wrong_tool_is_named(http: httpx.Client, wrong: dict[str, Any], param: str, words: str) -> None:
    answer = ask(http, tools=[tool(), wrong])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert param in error["message"] and words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [tool()] * 129}, "tools", "has 129 entries; there may be at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'function'"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            "there are: f",
        ),
        ({"tools": [tool()]}, "tools", "the model's chat template takes no tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ],
)
def test_what_cannot_be_done_with_tools(http: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    answer = ask(http, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_tools_that_must_not_be_called_need_no_template(http: httpx.Client) -> None:
    assert ask(http, tools=[tool(), tool(name="g", parameters=None, more="x")], tool_choice="none").status_code == 200
    assert ask(http, tools=[tool()] * 128, tool_choice="none").status_code == 200


def calling(path: Path, template: str, parser: str | None = None, **fields: Any) -> Calling:
    text = Text.load(vocabularies.qwen(path, chat_template=template), None, parser)
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool(), tool(name="g")], **fields}
    return calling_of(ChatBody.model_validate(body), text)


def test_what_is_read_and_what_is_forced(tmp_path: Path) -> None:
    auto = calling(tmp_path, "<tool_call>{{ tools }}")
    assert auto.reads and not auto.forced and not auto.one_call and len(auto.tools) == 2
    none = calling(tmp_path, "<tool_call>{{ tools }}", tool_choice="none")
    assert not none.reads and not none.forced and len(none.tools) == 2
    one = calling(tmp_path, "<tool_call>{{ tools }}", parallel_tool_calls=False)
    assert one.reads and one.one_call and not one.forced
    required = calling(tmp_path, "<tool_call>{{ tools }}", tool_choice="required")
    assert [function["name"] for function in required.forced] == ["f", "g"] and not required.one_call
    choice = {"type": "function", "function": {"name": "g"}}
    named = calling(tmp_path, "<tool_call>{{ tools }}", tool_choice=choice)
    assert [function["name"] for function in named.forced] == ["g"] and named.one_call


def test_templates_that_do_not_tell_the_format(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"--tool-call-parser mistral\|hermes\|llama3_json, or none"):
        calling(tmp_path, "{{ tools }}")
    assert calling(tmp_path, "{{ tools }}", "hermes").reads
    assert calling(tmp_path, "{{ tools }}", tool_choice="none").tools


def test_calls_that_the_server_leaves_to_the_client(tmp_path: Path) -> None:
    left = calling(tmp_path, "<tool_call>{{ tools }}", "none")
    assert len(left.tools) == 2 and not left.reads
    with pytest.raises(ApiError, match="so none can be forced"):
        calling(tmp_path, "<tool_call>{{ tools }}", "none", tool_choice="required")
