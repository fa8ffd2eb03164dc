"""Grammars from schemas, expressions, choices and notations; what cannot be followed is refused with its keyword."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from tandem.server.text import grammar as grammars
from tandem.server.text.grammar import GrammarChecker, GrammarError


class Bytes:
    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


BYTES = LLTokenizer(Bytes())  # pyright: ignore[reportArgumentType]
CHECKER = GrammarChecker()


def matches(grammar: str, text: str) -> bool:
    """Whether the whole text is one the grammar allows."""
    CHECKER.check(grammar)
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_allows_what_it_describes() -> None:
    grammar = grammars.of_schema(PERSON)
    assert grammars.of_schema(json.dumps(PERSON)) == grammar
    assert matches(grammar, '{"name": "Ada", "age": 36}')
    assert matches(grammar, '{\n  "name":"Ada",\n  "age":36\n}')
    assert not matches(grammar, '{"name": "Ada"}')
    assert not matches(grammar, '{"name": "Ada", "age": -1}')
    assert not matches(grammar, '{"name": "Ada", "age": 36, "x": 1}')


def test_json_object_is_any_object_and_nothing_else() -> None:
    grammar = grammars.json_object()
    assert matches(grammar, '{"a": [1, {"b": null}]}')
    assert not matches(grammar, "[1]")
    assert not matches(grammar, '{"a": 1')


def test_white_space_has_an_end() -> None:
    grammar = grammars.json_object()
    assert matches(grammar, "{" + " " * 64 + "}")
    assert not matches(grammar, "{" + " " * 65 + "}")


@pytest.mark.parametrize("text", ["naïve 😀", 'quo"te\\', "a\nb", "a/b"])
def test_choices_are_taken_literally(text: str) -> None:
    grammar = grammars.of_choice([text, "other"])
    assert matches(grammar, text)
    assert matches(grammar, "other")
    assert not matches(grammar, text + "x")


def test_expressions_match_from_end_to_end() -> None:
    grammar = grammars.of_regex(r"[a-c]+/\d{2}")
    assert matches(grammar, "abc/12")
    assert not matches(grammar, "abc/123")


@pytest.mark.parametrize("text", ['start: "a" x\nx: /[0-9]+/', 'root ::= "a" x\nx ::= [0-9]+'])
def test_both_notations_of_grammars(text: str) -> None:
    assert matches(grammars.of_lark(text), "a12")
    assert not matches(grammars.of_lark(text), "12")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, "not supported: not"),
        ({"type": "object", "properties": {"a": {"uniqueItems": True}}}, "not supported: uniqueItems"),
        ({"type": "array", "contains": {}, "if": {}}, "not supported: contains, if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "http://example.com/a"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "none"}, "Unknown format: none"),
        ({"type": "wat"}, "wat"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5)"),
        ({"description": "x" * 70_000}, "65536"),
        ([], "not list"),
        ("{", "no JSON"),
        ("[" * 100_000, "65536"),
        ("[" * 60_000, "no JSON"),
        (None, "NoneType"),
    ],
)
def test_what_a_schema_cannot_have_is_named(schema: object, words: str) -> None:
    with pytest.raises(GrammarError, match=r"(?s)") as caught:
        CHECKER.check(grammars.of_schema(schema))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "value", "words"),
    [
        (grammars.of_regex, "(a", "unclosed group"),
        (grammars.of_regex, "", "empty"),
        (grammars.of_regex, "a" * 70_000, "65536"),
        (grammars.of_regex, r"(a)\1", "backreferences"),
        (grammars.of_choice, [], "0 texts"),
        (grammars.of_choice, ["a", ""], "none of them empty"),
        (grammars.of_choice, ["a"] * 4097, "4096"),
        (grammars.of_choice, ["a" * 1000] * 100, "65536"),
        (grammars.of_lark, "start: x", 'unknown name: "x"'),
        (grammars.of_lark, "root ::= (", "Expected ')'"),
        (grammars.of_lark, 'start: start "a"', "cannot be used"),
        (grammars.of_lark, "x" * 70_000, "65536"),
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, value: Any, words: str) -> None:
    with pytest.raises(GrammarError) as caught:
        CHECKER.check(make(value))
    assert words in str(caught.value)


@pytest.mark.parametrize("regex", ["(a{1000}){1000}", "(a{100}){10000}x"])
def test_what_would_take_seconds_is_refused_before(regex: str) -> None:
    began = time.process_time()
    with pytest.raises(GrammarError, match="too many expressions"):
        CHECKER.check(grammars.of_regex(regex))
    assert time.process_time() - began < 2  # without limits three seconds of processor time for the first token alone


def test_a_large_schema_stays_inside_the_limits() -> None:
    properties = {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i + 1}}}$"} for i in range(1000)}
    CHECKER.check(grammars.of_schema({"type": "object", "properties": properties, "required": list(properties)}))


def test_good_grammars_are_remembered_and_the_oldest_forgotten() -> None:
    checker = GrammarChecker()
    first, more = grammars.of_regex("a0"), [grammars.of_regex(f"b{i}") for i in range(grammars.CHECKED)]
    checker.check(first)
    assert checker.known(first)
    for grammar in more:
        checker.check(grammar)
    assert not checker.known(first)
    assert checker.known(more[0])
