"""A stream of server-sent events from an OpenAI-compatible server, read while a clock runs, with little work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

DONE = b"[DONE]"
SHOWN = 300  # characters of an error that are kept


class StreamError(Exception):
    """The server said in the stream that it failed, or what it sent is no stream of answers."""


class Events:
    """Bytes of a text/event-stream -> the data of its events, however the bytes were cut.

    By the standard: lines end with LF, CR or CR LF, comments and other fields are dropped, data lines of one event are
    joined with LF. Beyond it: data lines that are each a JSON object of their own are taken as events, and the last
    event need not be ended by an empty line.
    """

    __slots__ = ("_after_cr", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False  # the last byte was a CR: a LF that comes next belongs to it

    def feed(self, data: bytes) -> list[bytes]:
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = data[-1:] == b"\r"
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._rest:
            data = self._rest + data
        *events, self._rest = data.split(b"\n\n")
        found: list[bytes] = []
        for event in events:
            if event[:6] == b"data: " and b"\n" not in event:
                found.append(event[6:])
            else:
                found.extend(_data_of(event))
        return found

    def close(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return list(_data_of(rest))


def _data_of(event: bytes) -> Iterator[bytes]:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line[:5] == b"data:"]
    if all(line == DONE or (line[:1] == b"{" and line[-1:] == b"}") for line in lines):
        yield from lines
    else:
        yield b"\n".join(lines)


# Only what is read; types are loose where servers differ.
class Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    text: Any = None
    delta: Delta | None = None
    token_ids: Any = None
    finish_reason: Any = None


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Any = None
    error: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


class Answer:
    """One stream as it comes in."""

    __slots__ = ("_pieces", "complete", "end", "finish_reason", "start", "times", "usage")

    def __init__(self, start: float) -> None:
        self.start = start
        self.end = 0.0
        self.times: list[float] = []
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.complete = False  # [DONE] came
        self._pieces: list[str] = []

    def take(self, data: bytes, now: float) -> None:
        """Raises StreamError."""
        if data == DONE:
            self.complete = True
            return
        try:
            chunk = decode_chunk(data)
        except msgspec.DecodeError as error:
            raise StreamError(f"an event is no chunk of an answer ({error}): {shortened(data)}") from None
        if chunk.error is not None:
            raise StreamError(f"error in the stream: {reason_in({'error': chunk.error})}")
        if isinstance(chunk.usage, dict):
            self.usage = chunk.usage
        if not chunk.choices:
            return
        has_content = False
        for choice in chunk.choices:
            delta = choice.delta
            if delta is None:
                piece = choice.text
            else:
                piece = delta.content or delta.reasoning_content or delta.reasoning
                has_content |= bool(delta.tool_calls)
            if piece:
                self._pieces.append(piece if isinstance(piece, str) else str(piece))
                has_content = True
            elif choice.token_ids:
                has_content = True
            if choice.finish_reason is not None:
                self.finish_reason = str(choice.finish_reason)
        self.end = now - self.start
        if has_content:
            self.times.append(self.end)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def told(self, *path: str) -> int | None:
        """A count in the usage; None where the server does not say."""
        value: Any = self.usage
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def missing(self) -> str:
        """What is wrong with the stream now that it is over; "" where nothing is."""
        if not self.complete and self.finish_reason is None:
            return "the stream ended early: no finish_reason and no [DONE]"
        if not self.times:
            return f"the answer has no content (finish_reason {self.finish_reason})"
        return ""


def shortened(data: bytes | str) -> str:
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def reason_in(answer: object) -> str:
    """The sentence in an error as OpenAI, FastAPI and others word it."""
    if isinstance(answer, dict):
        for name in ("error", "message", "detail"):
            if answer.get(name):
                return reason_in(answer[name])
    return shortened(answer if isinstance(answer, str) else msgspec.json.encode(answer))


def reason_of(body: bytes) -> str:
    try:
        return reason_in(msgspec.json.decode(body))
    except msgspec.DecodeError:
        return shortened(body)
