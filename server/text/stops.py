"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class Stops:
    """Cuts a text at the stop string whose match ends first, the longest of those that end together.

    Text that may still become a stop string is held back: never more than the longest one less a character.
    """

    def __init__(self, stops: Iterable[str], include: bool) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._firsts = {stop[0] for stop in self._stops}
        self._include = include
        self._held = ""

    def scan(self, text: str, active: bool) -> tuple[str, str | None]:
        """`text` follows what came before. Returns what can go out, and the stop string if it is complete.

        While not `active`, matches that end in `text` do not count, now or later.
        """
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        known = len(self._held)
        buffer = self._held + text
        if active:
            found: tuple[int, int, str] | None = None
            for stop in self._stops:
                start = buffer.find(stop, max(0, known - len(stop) + 1))
                if start >= 0:
                    match = (start + len(stop), start, stop)
                    found = match if found is None else min(found, match)
            if found is not None:
                end, start, stop = found
                self._held = ""
                return buffer[: end if self._include else start], stop
        held = self._possible_start(buffer)
        self._held = buffer[held:]
        return buffer[:held], None

    def _possible_start(self, buffer: str) -> int:
        """Where the longest end of the buffer begins that is the beginning of a stop string."""
        first = len(buffer)
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1), first)
            while start >= 0 and not stop.startswith(buffer[start:]):
                start = buffer.find(stop[0], start + 1, first)
            if start >= 0:
                first = start
        return first

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held
