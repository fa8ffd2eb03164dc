"""A marker in text that arrives in pieces."""

from __future__ import annotations


def may_begin(text: str, marker: str) -> int:
    """Where the longest end of `text` begins that is a proper beginning of `marker`; len(text) where none is."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length
    return len(text)


class UpTo:
    """Text up to a marker, without the space before it. Held back: what may be the marker, and space in front of it."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""
        self.space = ""  # that stood before the marker

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, what follows the marker once it is there). Starts anew after a marker."""
        if not self._held and text and not text[-1].isspace() and self._marker[0] not in text:
            return text, None
        buffer = self._held + text
        at = buffer.find(self._marker)
        if at >= 0:
            self._held = ""
            text = buffer[:at].rstrip()
            self.space = buffer[len(text) : at]
            return text, buffer[at + len(self._marker) :]
        certain = len(buffer[: may_begin(buffer, self._marker)].rstrip())
        self._held = buffer[certain:]
        return buffer[:certain], None

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held
