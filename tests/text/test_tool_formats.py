"""Calls in the text of an answer: every format, every cut into pieces, and what only looks like a call."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.server.text.events import Arguments, CallBegins, CallEnds, Content, End, Event, NoCall
from tandem.server.text.markers import UpTo
from tandem.server.text.reader import Reader
from tandem.server.text.tools.formats import FORMATS, taught_by

F, G = ("f", '{"x": 1}'), ("g", "{}")
WILD = '{"a": "}]\\"\\\\", "b": [{"ü🙂": "</tool_call>; [TOOL_CALLS]"}], "c": -1.5e3}'

# format -> [(text, calls, content)]
READ: dict[str, list[tuple[str, list[tuple[str, str]], str]]] = {
    "hermes": [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [F], ""),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [F], ""),
        ('Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n', [F], "Let me see."),
        (
            '<tool_call>{"name":"f","arguments":{"x": 1}}</tool_call>\n<tool_call>{"name":"g"}</tool_call> Wait.',
            [F, G],
            " Wait.",
        ),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}\n{"name": "g", "arguments": null}</tool_call>', [F, G], ""),
        ('<tool_call>{"name": "f", "parameters": "{\\"x\\": 1}"}', [F], ""),  # no closing tag, and JSON in a string
        (f'<tool_call>{{"name": "f", "arguments": {WILD}}}</tool_call>', [("f", WILD)], ""),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}} done', [F], " done"),
        ("1 < 2, <tool_calls> and <tool", [], "1 < 2, <tool_calls> and <tool"),
        (" plain \n", [], " plain \n"),
        ('{"name": "f", "arguments": {"x": 1}}', [], '{"name": "f", "arguments": {"x": 1}}'),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"x": 1}}', [F], ""),
        ('\n<|python_tag|>{"name": "f", "parameters": {"x": 1}}', [F], ""),
        ('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}};', [F, G], ""),
        ('I will. <|python_tag|> {"name": "f", "parameters": {"x": 1}}', [F], "I will."),
        (f'{{"type": "function", "name": "f", "parameters": {WILD}}}', [("f", WILD)], ""),
        ('{"name": "f", "parameters": {"x": 1}}; done', [F], "; done"),
        ('{"name": "Ann", "age": 5}', [], '{"name": "Ann", "age": 5}'),  # JSON that was asked for
        ('It is {"name": "f", "parameters": {}}', [], 'It is {"name": "f", "parameters": {}}'),
        (" <|python", [], " <|python"),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', [F, G], ""),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}] Wait.', [F], " Wait."),
        ('Yes.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', [F, G], "Yes."),
        ('[TOOL_CALLS]f{"x": 1}', [F], ""),
        ('[TOOL_CALLS]{"name": "f", "arguments": {"x": 1}}', [F], ""),
        (f"[TOOL_CALLS]f[ARGS]{WILD}", [("f", WILD)], ""),
        ("[TOOL_CALL] [TOOL_CALLS", [], "[TOOL_CALL] [TOOL_CALLS"),
    ],
}
# What begins as a call and is none.
BROKEN = {
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"x": tru}}\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1}, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"x": 1}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\n"}}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        "no \n <tool_call> call </tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": 1',
        '<tool_call>{"name": "f", "arguments": ' + '{"x":' * 99_999,
    ],
    "llama3_json": ['{"name": "f", "parameters": {"x": tru}}', "<|python_tag|>print(1)", '{"name": "f"', '{"a": {'],
    "mistral": [
        "[TOOL_CALLS] what is this?",
        "[TOOL_CALLS][]",
        " \n[TOOL_CALLS]f[ARGS]{x}",
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS]f[ARGS][1]{}",
        "[TOOL_CALLS]" + "f" * 999,
        "[TOOL_CALLS]" + "f" * 300 + "[ARGS]{}",
        "[TOOL_CALLS];{[TOOL_CALLS] {",
        "[TOOL_CALLS]",
    ],
}


def events_of(name: str, pieces: list[str], end: End = "ended") -> list[Event]:
    """Neighbouring texts joined: where they are cut is nobody's business."""
    parser = FORMATS[name].parser()
    joined: list[Event] = []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish(end):
        last = joined[-1] if joined else None
        if isinstance(last, Content | NoCall) and isinstance(event, Content):
            joined[-1] = type(last)(last.text + event.text)
        elif isinstance(last, Arguments) and isinstance(event, Arguments):
            joined[-1] = Arguments(last.text + event.text)
        else:
            joined.append(event)
    return joined


def told(events: list[Event]) -> tuple[list[tuple[str, str]], str]:
    """(complete calls, content), as a whole answer tells them."""
    calls: list[tuple[str, str]] = []
    content = name = arguments = ""
    for event in events:
        match event:
            case CallBegins(name):
                arguments = ""
            case Arguments(text):
                arguments += text
            case CallEnds():
                calls.append((name, arguments))
            case Content(text) | NoCall(text):
                content += text
    return calls, content


def spread(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{i}") for name, cases in table.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "case"), spread(READ))
def test_calls_are_read(name: str, case: tuple[str, list[tuple[str, str]], str]) -> None:
    text, calls, content = case
    assert told(events_of(name, [text])) == (calls, content)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("name", "text"), spread(BROKEN))
def test_what_is_no_call_is_content_to_the_letter(name: str, text: str) -> None:
    assert told(events_of(name, [text])) == ([], text)


TEXTS = [(name, case[0]) for name, cases in READ.items() for case in cases] + [
    (name, text) for name, texts in BROKEN.items() for text in texts if len(text) < 999
]


@pytest.mark.parametrize("end", ["ended", "cut"])
@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_where_the_text_is_cut_does_not_matter(name: str, text: str, end: End) -> None:
    whole = events_of(name, [text], end)
    assert events_of(name, list(text), end) == whole
    for at in range(1, len(text)):
        assert events_of(name, [text[:at], text[at:]], end) == whole, text[:at]


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    '{"name": "f", "arguments": {',
    "}}",
]
PARTS += ['{"name": "f", "parameters": {}}', '"', "\\", "[", "]", "{", "}", ",", ";", ":", " ", "\n", "f", "ü", "1"]


@given(st.sampled_from(list(FORMATS)), st.lists(st.sampled_from(PARTS), max_size=14))
def test_any_text_is_read_the_same_in_pieces(name: str, parts: list[str]) -> None:
    whole = events_of(name, ["".join(parts)])
    assert events_of(name, parts) == whole == events_of(name, list("".join(parts)))
    begun = [event for event in whole if isinstance(event, CallBegins)]
    ended = [event for event in whole if isinstance(event, CallEnds | NoCall)]
    assert len(begun) == len(ended)  # every call that begins is a call or said to be none
    calls, content = told(whole)
    if not calls:
        assert content == "".join(parts)


def test_arguments_are_told_as_they_come() -> None:
    parser = FORMATS["hermes"].parser()
    assert parser.push('<tool_call>{"name": "f"') == []
    assert parser.push(', "arguments": {"x"') == [CallBegins("f"), Arguments('{"x"')]
    assert parser.push(": 1") == [Arguments(": 1")]
    assert parser.push("}}") == [Arguments("}"), CallEnds()]


def test_a_call_that_was_cut_stays_incomplete_and_is_no_content() -> None:
    assert events_of("hermes", ['<tool_call>{"name": "f", "arguments": {"x": 1'], "cut")[:2] == [
        CallBegins("f"),
        Arguments('{"x": 1'),
    ]
    assert told(events_of("hermes", ['<tool_call>{"name": "f'], "cut")) == ([], '<tool_call>{"name": "f')


def test_prose_is_held_back_only_where_it_may_be_a_marker() -> None:
    upto = UpTo("<tool_call>")
    assert [upto.push(piece)[0] for piece in ("a ", "b <", "tool", "s> c", " <tool_")] == [
        "a",
        " b",
        "",
        " <tools> c",
        "",
    ]
    assert upto.push("call>rest") == ("", "rest") and upto.space == " "


def test_one_call_ends_the_answer() -> None:
    text = 'So: <tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call> more'
    reader = Reader(None, FORMATS["hermes"].parser(), one_call=True)
    events = [event for piece in re.findall(".{1,3}", text) for event in reader.push(piece)] + reader.finish("ended")
    assert told(events) == ([("f", "{}")], "So:") and reader.over


QWEN = "<tools>\n{{ tool | tojson }}\n</tools> ... within <tool_call></tool_call> XML tags"
TEMPLATES = {
    "hermes": QWEN,
    "mistral": "{{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' }}",
    "llama3_json": """Respond in the format {"name": function name, "parameters": dictionary of argument name}.""",
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_template_tells_the_format(name: str) -> None:
    assert taught_by(TEMPLATES[name]) is FORMATS[name]


def test_a_format_that_is_not_read_is_not_taken_for_another() -> None:
    assert taught_by("<tool_call>\n<function=name>\n<parameter=x>") is None  # Qwen3-Coder's
    assert taught_by("<|im_start|>{{ message.content }}") is None


def test_ids() -> None:
    for _ in range(20):
        assert re.fullmatch(r"call_[a-zA-Z0-9]{24}", FORMATS["hermes"].new_id())
        assert re.fullmatch(r"[a-zA-Z0-9]{9}", FORMATS["mistral"].new_id())
