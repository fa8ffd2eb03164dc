"""Grammars of forced calls: what they let through is a call that the format's parser reads, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from llguidance import LLMatcher, LLTokenizer

from tandem.server.text.grammar import GrammarChecker, GrammarError, of_choice, of_regex, of_schema
from tandem.server.text.reasoning import Stage
from tandem.server.text.text import Text
from tandem.server.text.tools.forced import arguments_of

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "unit": {"enum": ["m", "km"]}},
        "required": ["a"],
    },
}
NOW = {"name": "now"}
TEMPLATES = {
    "hermes": "<tool_call>",
    "llama3_json": "<|python_tag|>",
    "mistral": "[TOOL_CALLS] [",
    "mistral v11": "[TOOL_CALLS]name[ARGS]",
}
ONE = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]',
    "mistral v11": '[TOOL_CALLS]add[ARGS]{"a": 1}',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3_json": ONE["llama3_json"] + '; {"name": "now", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]',
    "mistral v11": ONE["mistral v11"] + "[TOOL_CALLS]now[ARGS]{}",
}


class Bytes:
    """A vocabulary of bytes and an end."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def allows(grammar: str, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer(Bytes()), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def text_of(path: Path, template: str, **config: Any) -> Text:
    return Text.load(vocabularies.qwen(path, chat_template=template + "{{ tools }}", **config), None, None, "qwen3")


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_in_the_format_of_the_template(tmp_path: Path, name: str) -> None:
    text = text_of(tmp_path, TEMPLATES[name])
    many, one = (text.grammar("answers", [ADD, NOW], only, tokens=False) for only in (False, True))
    GrammarChecker().check(many)
    assert allows(many, ONE[name]) and allows(many, TWO[name])
    assert allows(one, ONE[name]) and not allows(one, TWO[name])
    for old, new in ("1}", '"x"}'), ('{"a', '{"b'), ("1}", '1, "unit": "mile"}'), ("add", "sub"), ("add", "now"):
        assert old in ONE[name] and not allows(many, ONE[name].replace(old, new)), new
    assert not allows(many, "I cannot.") and not allows(many, "")
    named = text.grammar("answers", [NOW], True, tokens=False)
    assert not allows(named, ONE[name])
    reader = text.reader(True, "answers")
    assert reader is not None
    reader.push(TWO[name])
    reader.finish("ended")
    assert reader.calls == 2


def test_markers_that_are_special_tokens_stand_as_tokens(tmp_path: Path) -> None:
    special = text_of(tmp_path / "a", "[TOOL_CALLS]", additional_special_tokens=["[TOOL_CALLS]"])
    plain = text_of(tmp_path / "b", "[TOOL_CALLS]")
    assert f"<[{special.token_id('[TOOL_CALLS]')}]>" in special.grammar("answers", [NOW])
    assert '"[TOOL_CALLS]' in plain.grammar("answers", [NOW])
    assert '"[TOOL_CALLS]' in special.grammar("answers", [NOW], tokens=False)


@pytest.mark.parametrize(
    ("stage", "good", "bad"),
    [
        ("answers", [""], ["<think>a</think>", "a</think>"]),
        ("may think", ["", "<think>a <b\n</think>", "<think></think>\n\n"], ["a</think>", "<think>a", " "]),
        ("thinks", ["</think>", "a <b\n</think>\n\n"], ["", "<think>a"]),
    ],
)
def test_thinking_goes_before(tmp_path: Path, stage: Stage, good: list[str], bad: list[str]) -> None:
    text = text_of(tmp_path, "<tool_call>")
    call, answer = ONE["hermes"], '{"x":1}'
    schema = of_schema({"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False})
    calls = text.grammar(stage, [ADD], tokens=False)
    shaped = text.grammar(stage, [], answer=schema, tokens=False)
    either = text.grammar(stage, [ADD], answer=schema, tokens=False)
    for thought in good:
        assert allows(calls, thought + call) and not allows(calls, thought + answer)
        assert allows(shaped, thought + answer) and not allows(shaped, thought + call)
        assert allows(either, thought + answer) and allows(either, thought + call)
    for thought in bad:
        assert not allows(either, thought + call) and not allows(either, thought + answer)


@pytest.mark.parametrize(("answer", "said"), [(of_regex("a+b"), "aab"), (of_choice(["yes", "no"]), "no")])
def test_any_grammar_may_follow_thinking(tmp_path: Path, answer: str, said: str) -> None:
    grammar = text_of(tmp_path, "x").grammar("may think", [], answer=answer, tokens=False)
    GrammarChecker().check(grammar)
    assert allows(grammar, said) and allows(grammar, f"<think>hm</think>\n{said}") and not allows(grammar, "x")


def test_the_size_of_a_grammar_is_bounded(tmp_path: Path) -> None:
    large = {"name": "f", "parameters": {"type": "object", "properties": {"x" * 70_000: {}}}}
    with pytest.raises(GrammarError, match="characters; it may have at most"):
        text_of(tmp_path, "<tool_call>").grammar("answers", [large])


def test_schemas_of_arguments() -> None:
    assert arguments_of({"name": "f"}) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert arguments_of(ADD) == {**ADD["parameters"], "additionalProperties": False}
    open_ended: list[dict[str, Any]] = [
        {"type": "object"},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {}, "patternProperties": {}},
        {"type": "object", "properties": {}, "anyOf": []},
    ]
    for parameters in open_ended:
        assert arguments_of({"parameters": parameters}) == parameters
    assert json.dumps(ADD).count("additional") == 0  # the request's own is left alone
