"""The cheapest client there is: one thread, epoll, plain sockets, and a look at nothing but where events begin.

For measuring servers, not for reading what they say: `client.py` parses answers. Here a stream costs a system call for
what has arrived and one pass over its bytes, so that on a small machine most of the time is the server's.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

EVENT = b"data: "
LAST = b"0\r\n\r\n"  # of a chunked body
DONE = b"data: [DONE]"
RECEIVE = 1 << 16


@dataclass(slots=True)
class Reader:
    """One connection and what has come over it."""

    connection: socket.socket
    events: int = 0
    size: int = 0  # bytes
    first: float | None = None  # time.perf_counter of the first event
    done: bool = False  # the last event has come
    ended: bool = False  # and the body's end
    tail: bytes = b""  # what may be the beginning of a mark that is cut in two


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two moments at which every stream was running."""

    seconds: float
    events: int
    size: int  # bytes


@dataclass(slots=True)
class Streams:
    """The result of `read_streams`."""

    seconds: float  # from the first request until the last answer's end
    events: int
    size: int
    first_event: list[float] = field(default_factory=list[float])  # seconds, by stream
    window: Window | None = None


class Broken(Exception):
    """An answer was not what was asked for; the text begins with what came instead."""


def request_bytes(url: str, path: str, body: dict[str, Any]) -> bytes:
    host = urlsplit(url).netloc
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_streams(
    url: str,
    path: str,
    bodies: list[dict[str, Any]],
    *,
    margin: int = 0,
    expected: int = 0,
    on_window: Callable[[], None] = lambda: None,
    timeout: float = 300.0,
) -> Streams:
    """Sends all requests at once, each over a connection of its own, and reads until every stream has ended.

    The window opens once every stream has had `margin` events and closes as soon as one has had `expected` - `margin`
    or has ended; `on_window` is called at both moments. Raises Broken, and TimeoutError.
    """
    readers = [Reader(connect(url)) for _ in bodies]
    began = time.perf_counter()
    for reader, body in zip(readers, bodies, strict=True):
        reader.connection.sendall(request_bytes(url, path, body))
        reader.connection.setblocking(False)
    streams = Streams(0.0, 0, 0)
    marks: list[tuple[float, int, int]] = []

    def mark() -> None:
        on_window()
        marks.append((time.perf_counter(), sum(one.events for one in readers), sum(one.size for one in readers)))

    early = len(readers)  # streams that have not had `margin` events
    by_descriptor = {reader.connection.fileno(): reader for reader in readers}
    with select.epoll() as poll:
        for descriptor in by_descriptor:
            poll.register(descriptor, select.EPOLLIN)
        left = len(readers)
        while left:
            ready = poll.poll(1.0)
            if time.perf_counter() - began > timeout:
                raise TimeoutError(f"{left} of {len(readers)} streams had not ended after {timeout:g} s")
            for descriptor, _ in ready:
                reader = by_descriptor[descriptor]
                before = reader.events
                if _take(reader):
                    poll.unregister(descriptor)
                    left -= 1
                early -= before < margin <= reader.events
                opens = margin and not marks and not early
                closes = len(marks) == 1 and (reader.ended or reader.events >= expected - margin)
                if opens or closes:
                    mark()
    streams.seconds = time.perf_counter() - began
    streams.events, streams.size = sum(one.events for one in readers), sum(one.size for one in readers)
    streams.first_event = [reader.first - began for reader in readers if reader.first is not None]
    if len(marks) == 2:
        (start, events, size), (end, more_events, more_size) = marks
        streams.window = Window(end - start, more_events - events, more_size - size)
    for reader in readers:
        reader.connection.close()
    return streams


def _take(reader: Reader) -> bool:
    """Reads what is there; whether the stream has ended. Raises Broken."""
    try:
        data = reader.connection.recv(RECEIVE)
    except BlockingIOError:
        return False
    if reader.first is None and not reader.size and not data.startswith(b"HTTP/1.1 200"):
        raise Broken(data[:500].decode("utf-8", "replace"))
    reader.size += len(data)
    seen = reader.tail + data
    reader.events += seen.count(EVENT) - reader.tail.count(EVENT)
    if reader.events and reader.first is None:
        reader.first = time.perf_counter()
    reader.done = reader.done or DONE in seen
    reader.ended = seen.endswith(LAST)
    if not data or (reader.ended and not reader.done):
        raise Broken("the stream ended early: " + seen[-500:].decode("utf-8", "replace"))
    reader.tail = seen[1 - len(DONE) :]
    return reader.ended


def events_of(url: str, path: str, body: dict[str, Any]) -> list[bytes]:
    """The chunks of one streamed answer as the server wrote them, each one event or several."""
    connection = connect(url)
    try:
        connection.sendall(request_bytes(url, path, body))
        received = bytearray()
        while not received.endswith(LAST):
            data = connection.recv(RECEIVE)
            if not data:
                raise Broken("the stream ended early: " + received[-500:].decode("utf-8", "replace"))
            received += data
    finally:
        connection.close()
    head, _, content = bytes(received).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Broken(bytes(received[:500]).decode("utf-8", "replace"))
    return list(_chunks(content))


def _chunks(content: bytes) -> Iterator[bytes]:
    """The pieces of a chunked body."""
    at = 0
    while True:
        end = content.index(b"\r\n", at)
        length = int(content[at:end], 16)
        if not length:
            return
        yield content[end + 2 : end + 2 + length]
        at = end + 2 + length + 2
