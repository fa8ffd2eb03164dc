"""Hermes 2 and 3, Qwen2.5, Qwen3, and the bundled policy:

<tool_call>
{"name": "f", "arguments": {"x": 1}}
</tool_call>
"""

from __future__ import annotations

from ..events import Content, End, Event, NoCall
from ..markers import UpTo
from .objects import Broken, CallObject

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    def __init__(self) -> None:
        self._prose = UpTo(OPEN)
        self._call: CallObject | None = None  # the one being read
        self._before = ""  # what `raw` of the call lacks: space and the tag
        self._behind: str | None = None  # what follows a complete one, as long as it may be the closing tag
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest = text
        while rest:
            if self._call is not None:
                rest = self._inside(self._call, rest, events)
            elif self._behind is not None:
                rest = self._after(self._behind + rest)
            else:
                content, after = self._prose.push(rest)
                if content:
                    events.append(Content(content))
                rest = after or ""
                if after is not None:
                    self._call, self._before = CallObject(), self._prose.space + OPEN
        return events

    def _inside(self, call: CallObject, text: str, events: list[Event]) -> str:
        try:
            more, rest = call.push(text)
        except Broken as broken:
            self._call = None
            events += [*broken.events, self._given_up(call)]
            return broken.rest
        events += more
        if rest is None:
            return ""
        self._call, self._behind = None, ""
        self._calls += 1
        return rest

    def _after(self, text: str) -> str:
        """Behind a call: its closing tag, or another call in the same tags, or prose where the tag was forgotten."""
        bare = text.lstrip()
        if CLOSE.startswith(bare):
            self._behind = text if bare != CLOSE else None
            return ""
        self._behind = None
        if bare.startswith("{"):
            self._call, self._before = CallObject(), text.removesuffix(bare)
            return bare
        return bare.removeprefix(CLOSE) if bare.startswith(CLOSE) else text

    def _given_up(self, call: CallObject) -> Event:
        text = self._before + call.raw
        return NoCall(text) if call.begun else Content(text)

    def finish(self, end: End) -> list[Event]:
        if self._call is not None:
            return [] if end == "cut" and self._call.begun else [self._given_up(self._call)]
        rest = self._prose.rest()
        return [Content(rest)] if rest and not (self._calls and rest.isspace()) else []
