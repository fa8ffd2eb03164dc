"""Llama 3.1 to 3.3: JSON alone, or behind a token that says that what follows is none of prose.

{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}
<|python_tag|>{"name": "f", "parameters": {"x": 1}}
"""

from __future__ import annotations

from ..events import Content, End, Event, NoCall
from ..markers import UpTo
from .objects import Broken, CallObject

TAG = "<|python_tag|>"


class Llama3:
    """An object without the tag is a call at the beginning of the answer or behind another call, nowhere else."""

    def __init__(self) -> None:
        self._prose = UpTo(TAG)
        self._call: CallObject | None = None
        self._before = ""  # what `raw` of the call lacks: space, `;` and the tag
        self._between: str | None = ""  # at the beginning and behind a call: what may lead to a call; None: prose
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest = text
        while rest:
            if self._call is not None:
                rest = self._inside(self._call, rest, events)
            elif self._between is not None:
                rest = self._lead(self._between + rest)
            else:
                content, after = self._prose.push(rest)
                if content:
                    events.append(Content(content))
                rest = after or ""
                if after is not None:
                    self._begin(self._prose.space + TAG)
        return events

    def _begin(self, before: str) -> None:
        self._call, self._before, self._between = CallObject(needs_arguments=True), before, None

    def _lead(self, text: str) -> str:
        bare = text.lstrip()
        if self._calls and bare.startswith(";"):
            bare = bare[1:].lstrip()
        if bare.startswith(("{", TAG)):
            bare = bare.removeprefix(TAG)
            self._begin(text.removesuffix(bare))
            return bare
        if TAG.startswith(bare):  # as nothing does
            self._between = text
            return ""
        self._between = None
        return text

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
        self._call, self._between = None, ""
        self._calls += 1
        return rest

    def _given_up(self, call: CallObject) -> Event:
        text = self._before + call.raw
        return NoCall(text) if call.begun else Content(text)

    def finish(self, end: End) -> list[Event]:
        if self._call is not None:
            return [] if end == "cut" and self._call.begun else [self._given_up(self._call)]
        if self._between is not None and self._calls:
            return []
        rest = (self._between or "") + self._prose.rest()
        return [Content(rest)] if rest and not (self._calls and rest.isspace()) else []
