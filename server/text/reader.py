"""`Reader`: the text of one answer -> its thinking, its prose and its calls."""

from __future__ import annotations

from collections.abc import Callable

from .events import CallEnds, CallParser, Content, End, Event, Reasoning
from .reasoning import Thinking


class Reader:
    """First the thinking is taken off, then calls are looked for in the rest."""

    def __init__(
        self,
        thinking: Thinking | None,
        calls: CallParser | None,
        one_call: bool = False,
        new_id: Callable[[], str] = lambda: "",
    ) -> None:
        self._thinking = thinking
        self._parser = calls
        self.new_id = new_id  # of a call
        self.one_call = one_call  # whether the answer ends with its first call
        self.calls = 0  # complete ones so far

    @property
    def over(self) -> bool:
        """Whether the answer has its one call; what follows is read as nothing."""
        return self.one_call and self.calls > 0

    def push(self, text: str) -> list[Event]:
        if self._thinking is None:
            return self._read(text)
        thought, rest = self._thinking.push(text)
        events = self._read(rest)
        return [Reasoning(thought), *events] if thought else events

    def finish(self, end: End) -> list[Event]:
        """What is still held back."""
        events: list[Event] = []
        if self._thinking is not None:
            thought, rest = self._thinking.rest()
            events = [*([Reasoning(thought)] if thought else []), *self._read(rest)]
        return events if self._parser is None or self.over else [*events, *self._counted(self._parser.finish(end))]

    def _read(self, text: str) -> list[Event]:
        if not text or self.over:
            return []
        return [Content(text)] if self._parser is None else self._counted(self._parser.push(text))

    def _counted(self, events: list[Event]) -> list[Event]:
        for index, event in enumerate(events):
            if isinstance(event, CallEnds):
                self.calls += 1
                if self.one_call:
                    return events[: index + 1]
        return events
