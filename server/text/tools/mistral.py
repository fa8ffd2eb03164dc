"""Mistral, in its three forms (the numbers are those of its tokenizers):

[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, …]          v3 to v7
[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}               v11 and later
[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}                  v11, in Mistral Small 3.2
"""

from __future__ import annotations

import re

from ..events import Arguments, CallBegins, CallEnds, Content, End, Event, NoCall
from ..markers import UpTo
from .objects import Broken, CallObject, Value, parsed

MARKER, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
MAX_HEAD = 256  # characters before the arguments


class NamedCall:
    """`f[ARGS]{…}`, with the interface of `CallObject`."""

    def __init__(self) -> None:
        self.begun = False
        self.raw = ""
        self._value: Value | None = None
        self._arguments = 0  # where they begin in `raw`

    def push(self, text: str) -> tuple[list[Event], str | None]:
        events: list[Event] = []
        if self._value is None:
            self.raw += text
            head = HEAD.match(self.raw)
            if head is None or head.end() > MAX_HEAD:
                brace = self.raw.find("{")
                if brace < 0 and len(self.raw) <= MAX_HEAD:
                    return events, None
                end = MAX_HEAD if brace < 0 else min(brace, MAX_HEAD)
                self.raw, rest = self.raw[:end], self.raw[end:]
                raise Broken(events, rest)
            self.begun, self._value, self._arguments = True, Value("{"), head.end()
            events.append(CallBegins(head[1]))
            self.raw, text = self.raw[: head.end()], self.raw[head.end() :]
        end = self._value.push(text, 0)
        self.raw += text[:end]
        if end:
            events.append(Arguments(text[:end]))
        if not self._value.done:
            return events, None
        if not isinstance(parsed(self.raw[self._arguments :]), dict):
            raise Broken(events, text[end:])
        return [*events, CallEnds()], text[end:]


class Mistral:
    def __init__(self) -> None:
        self._prose = UpTo(MARKER)
        self._call: CallObject | NamedCall | None = None
        self._before = ""  # what `raw` of the call lacks
        self._lead: str | None = None  # behind the marker, before it is known which form follows
        self._behind: str | None = None  # behind an object of a list: what leads to the next, or ends the list
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest = text
        while rest:
            if self._call is not None:
                rest = self._inside(self._call, rest, events)
            elif self._lead is not None:
                rest = self._form(self._lead + rest)
            elif self._behind is not None:
                rest = self._next(self._behind + rest)
            else:
                content, after = self._prose.push(rest)
                if content:
                    events.append(Content(content))
                rest = after or ""
                if after is not None:
                    self._lead = ""
        return events

    def _form(self, text: str) -> str:
        bare = text.lstrip()
        if bare in ("", "["):
            self._lead = text
            return ""
        self._lead = None
        if bare.startswith("["):
            bare = bare[1:].lstrip()
        listed = bare.startswith("{") or bare != text.lstrip()
        self._call = CallObject() if listed else NamedCall()
        self._before = self._prose.space + MARKER + text.removesuffix(bare)
        return bare

    def _next(self, text: str) -> str:
        bare = text.lstrip()
        if bare.startswith(","):
            bare = bare[1:].lstrip()
            if bare.startswith("{"):
                self._call, self._before, self._behind = CallObject(), text.removesuffix(bare), None
                return bare
        if not bare:
            self._behind = text
            return ""
        self._behind = None
        return bare.removeprefix("]") if bare.startswith("]") else text

    def _inside(self, call: CallObject | NamedCall, text: str, events: list[Event]) -> str:
        try:
            more, rest = call.push(text)
        except Broken as broken:
            self._call = None
            events += [*broken.events, self._given_up(call)]
            return broken.rest
        events += more
        if rest is None:
            return ""
        self._call, self._behind = None, "" if isinstance(call, CallObject) else None
        self._calls += 1
        return rest

    def _given_up(self, call: CallObject | NamedCall) -> Event:
        text = self._before + call.raw
        return NoCall(text) if call.begun else Content(text)

    def finish(self, end: End) -> list[Event]:
        if self._call is not None:
            return [] if end == "cut" and self._call.begun else [self._given_up(self._call)]
        if self._lead is not None:
            return [Content(self._prose.space + MARKER + self._lead)]
        if self._behind is not None:
            return []
        rest = self._prose.rest()
        return [Content(rest)] if rest and not (self._calls and rest.isspace()) else []
