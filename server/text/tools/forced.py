"""Grammars of answers that call tools: the format's frame around JSON of each function's schema.

A schema without `additionalProperties` is taken as closed where it lists its properties and nothing else bears on them:
what a function does not name, it does not want.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..grammar import of_lark
from ..reasoning import CLOSE, OPEN, Stage
from .formats import Frame

Spell = Callable[[str], str]  # a marker as it stands in a grammar
SPACE = r"\x20"  # one between the tokens of JSON, or none: calls stand on a line
PLAIN = frozenset(["type", "properties", "required", "title", "description", "$defs", "definitions", "$schema"])


def literal(text: str) -> str:
    return json.dumps(text)


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments."""
    schema: dict[str, Any] = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    if schema.keys() <= PLAIN and "properties" in schema:
        schema["additionalProperties"] = False
    return schema


def composed(
    stage: Stage, calls: Sequence[Mapping[str, Any]], frame: Frame | None, one_call: bool, answer: str, spell: Spell
) -> str:
    """What an answer must be: thinking where it may be or must be ended, then calls of these functions or what the
    grammar `answer` allows. Without functions, or with an empty `answer`, it is only the other.

    Raises GrammarError where it gets too large.
    """
    rules: list[str] = []
    bodies: list[str] = []
    if calls and frame is not None:
        rules += _calls(calls, frame, one_call, spell)
        bodies.append("calls")
    if answer:
        bodies.append("@answer")
    body = " | ".join(bodies)
    if stage != "answers":
        space = r"/\s{0,8}/"  # a reader drops it
        body = f"thought {space} ({body})" if stage == "thinks" else f"({spell(OPEN)} thought {space})? ({body})"
        close = spell(CLOSE)
        rules.append(
            f"thought: /(?s:.*)/ {close}"
            if close.startswith("<")
            else f"thought[lazy]: /(?s:.*){re.escape(CLOSE).replace('/', chr(92) + '/')}/"
        )
    lark = of_lark("\n".join([f"start: {body}", *rules]))
    if not answer:
        return lark
    first, *others = json.loads(answer)["grammars"] if answer.startswith("{") else [{"lark_grammar": answer}]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": "answer"}, *others]})


def _calls(functions: Sequence[Mapping[str, Any]], frame: Frame, one_call: bool, spell: Spell) -> Iterable[str]:
    def written(text: str) -> str:
        parts = re.split(f"({'|'.join(map(re.escape, frame.markers))})", text) if frame.markers else [text]
        return " ".join(spell(part) if part in frame.markers else literal(part) for part in parts if part)

    more = "" if one_call else f"({written(frame.between)} call)*"
    yield f"calls: {written(frame.begin)} call {more} {written(frame.end)}"
    names = " | ".join(f"f{i}" for i in range(len(functions)))
    yield f"call: {written(frame.before)} ({names}) {written(frame.after)}"
    for i, function in enumerate(functions):
        schema = {**arguments_of(function), "x-guidance": {"whitespace_pattern": SPACE}}
        yield f"f{i}: {literal(function['name'])} {written(frame.middle)} %json {json.dumps(schema)}"
