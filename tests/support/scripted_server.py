"""An HTTP server that sends exact bytes at exact moments: what a load generator must find is known beforehand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Step = bytes | float  # send this, or wait so many seconds after the step before
Script = Callable[[dict[str, Any], int], Iterable[Step]]  # body and number of the request -> steps; then the end

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
CLOSE = b""  # as a step: close the connection


class ScriptedServer:
    """`with ScriptedServer(script) as server:` answers POSTs by the script, and GET /v1/models with one model."""

    def __init__(self, script: Script, model: str = "scripted") -> None:
        self._script, self._model = script, model
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.arrivals: list[float] = []  # perf_counter of every POST
        self.open = self.most_open = 0  # requests that are being answered
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._over.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            writer.write(document(200, {"object": "list", "data": [{"id": self._model, "object": "model"}]}))
            return True
        lengths = [line.partition(":")[2] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
        body = json.loads(await reader.readexactly(int(lengths[0])))
        moment = time.perf_counter()
        self.arrivals.append(moment)
        self.bodies.append(body)
        self.headers.append(head)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for step in self._script(body, len(self.bodies) - 1):
                if isinstance(step, float):
                    moment += step
                    await asyncio.sleep(max(0.0, moment - time.perf_counter()))
                elif step == CLOSE:
                    return False
                else:
                    writer.write(step)
                    await writer.drain()
        finally:
            self.open -= 1
        return True


def document(status: int, value: object) -> bytes:
    """A whole JSON answer."""
    text = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


def part(data: bytes) -> bytes:
    """One part of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def completion(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": found})


def tokens(count: int, first: float, gap: float, *after: bytes) -> Iterator[Step]:
    """A stream whose first of `count` tokens comes after `first` seconds and each other one `gap` seconds later.

    `after`: further events behind the last token, in the same write.
    """
    yield STREAM
    for index in range(count):
        yield first if index == 0 else gap
        last = index == count - 1
        found = completion("x", "length" if last else None)
        yield part(found + b"".join(after) + b"data: [DONE]\n\n" if last else found)
    yield END
