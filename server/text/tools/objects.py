"""JSON as a model writes it: where a value ends, and the one object that is a call."""

# JSON of any shape is taken apart here:
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ..events import Arguments, CallBegins, CallEnds, Event

SPACE = " \t\r\n"
IN_STRING = re.compile(r'["\\]')
IN_BRACKETS = re.compile(r'["{}\[\]]')
AFTER_SCALAR = re.compile(r"[,}\]\s]")
ARGUMENT_KEYS = ("arguments", "parameters")


class Broken(Exception):
    """It is no call. `events` are those from before that was seen, `rest` is what has not been looked at."""

    def __init__(self, events: list[Event], rest: str) -> None:
        super().__init__(rest)
        self.events, self.rest = events, rest


class NoJson(Exception):
    """What is read is no JSON, or not of a call."""


class Value:
    """Finds the end of one JSON value by its quotes and brackets; whether it is valid is seen when it is parsed."""

    __slots__ = ("_depth", "_escaped", "_quoted", "done", "first")

    def __init__(self, first: str) -> None:
        self.first = first  # its first character, which `push` is still to be given
        self.done = False
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str, at: int) -> int:
        """The index behind what belongs to the value; at the end of `text` it may go on, unless it is `done`."""
        if self.first not in '"{[':
            found = AFTER_SCALAR.search(text, at)
            self.done = found is not None
            return len(text) if found is None else found.start()
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (IN_STRING if self._quoted else IN_BRACKETS).search(text, at)
            if found is None:
                return len(text)
            at = found.end()
            match found[0]:
                case "\\":
                    self._escaped = True
                    continue
                case '"':
                    self._quoted = not self._quoted
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
            if not self._quoted and self._depth == 0:
                self.done = True
                return at
        return at


def refuse(constant: str) -> NoReturn:
    """NaN and infinities, which Python reads and JSON has not."""
    raise ValueError(constant)


def parsed(text: str) -> Any:
    """The JSON value; None where the text is none."""
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


class CallObject:
    """`{"name": "f", "arguments": {…}}`; "parameters" does as well, and so do arguments as a string of JSON.

    The call begins once its name is known and its arguments open, or at the end of the object.
    """

    def __init__(self, needs_arguments: bool = False) -> None:
        self.begun = False
        self._needs_arguments = needs_arguments
        self._raw: list[str] = []
        self._state = "{"  # what is to come: `{`, a key, `:`, a value, or `,`
        self._value: Value | None = None  # the key or value being read
        self._parts: list[str] = []  # of it
        self._streams = False  # whether it is arguments that go out as they come
        self._key = ""
        self._found: dict[str, str] = {}  # key -> JSON text of its value

    @property
    def raw(self) -> str:
        """All that was pushed and belongs to it."""
        return "".join(self._raw)

    def push(self, text: str) -> tuple[list[Event], str | None]:
        """What it says, and what follows the object once it is complete. Raises Broken, after which `raw` counts."""
        events: list[Event] = []
        at = start = 0
        try:
            while at < len(text):
                if self._value is not None:
                    begin, at = at, self._value.push(text, at)
                    self._take(text[begin:at], events)
                elif text[at] in SPACE:
                    at += 1
                else:
                    at += self._structure(text[at])
                    if self._state == "end":
                        self._raw.append(text[start:at])
                        start = at
                        events += self._end()
                        return events, text[at:]
        except NoJson:
            self._raw.append(text[start:at])
            raise Broken(events, text[at:]) from None
        self._raw.append(text[start:])
        return events, None

    def _structure(self, character: str) -> int:
        """Takes a character between values; 0 where it is the first of one."""
        state, after = self._state, ""
        if state == "{" and character == "{":
            after = "key or }"
        elif state in ("key", "key or }") and character == '"':
            self._value = Value(character)
            return 0
        elif state == ":" and character == ":":
            after = "value"
        elif state == "value" and character not in ",:}]":
            self._value = Value(character)
            return 0
        elif state == "," and character == ",":
            after = "key"
        elif state in (",", "key or }") and character == "}":
            after = "end"
        if not after:
            raise NoJson
        self._state = after
        return 1

    def _take(self, piece: str, events: list[Event]) -> None:
        value = self._value
        assert value is not None
        if self._state == "value" and not self._parts and self._key in ARGUMENT_KEYS and value.first == "{":
            name = parsed(self._found.get("name", ""))
            if isinstance(name, str) and name:
                self.begun = self._streams = True
                events.append(CallBegins(name))
        self._parts.append(piece)
        if self._streams and piece:
            events.append(Arguments(piece))
        if value.done:
            self._value_done("".join(self._parts))

    def _value_done(self, text: str) -> None:
        self._value, self._parts, self._streams = None, [], False
        if self._state == "value":
            self._found[self._key] = text
            self._state = ","
            return
        key = parsed(text)
        if not isinstance(key, str):
            raise NoJson
        self._key = "arguments" if key in ARGUMENT_KEYS else key
        if self._key in self._found:
            raise NoJson
        self._state = ":"

    def _end(self) -> list[Event]:
        whole = parsed(self.raw)
        if not isinstance(whole, dict):
            raise NoJson
        if self.begun:
            return [CallEnds()]
        name, text = whole.get("name"), self._found.get("arguments", "" if self._needs_arguments else "{}")
        if text[:1] == '"':  # JSON inside a string
            text = parsed(text).strip() or "{}"
        elif text == "null":
            text = "{}"
        if not isinstance(name, str) or not name or not isinstance(parsed(text), dict):
            raise NoJson
        self.begun = True
        return [CallBegins(name), Arguments(text), CallEnds()]
