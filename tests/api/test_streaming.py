"""What keeps a stream alive while nothing comes, on a generation whose pace the test sets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterable

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message, Scope

from tandem.server.api import errors
from tandem.server.api.errors import invalid
from tandem.server.api.options import ApiOptions
from tandem.server.api.security import Gate
from tandem.server.api.streaming import stream


class Slow:
    """A `Generation` that answers after a while, three times."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.seconds, self.error, self.left, self.closed = seconds, error, 3, False

    async def step(self) -> list[str]:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.left -= 1
        return [str(self.left)] if self.left >= 0 else []

    def close(self) -> None:
        self.closed = True


class Shape:
    def opening(self) -> str:
        return "data: open\n\n"

    def changes(self, choices: Iterable[str]) -> str:
        return "".join(f"data: {choice}\n\n" for choice in choices)

    def closing(self) -> str:
        return ""


async def streamed(generation: Slow, **options: float) -> httpx.Response:
    app = FastAPI()

    @app.get("/")
    async def route(request: Request):
        return await stream(request, generation, Shape(), ApiOptions(**options), {})

    errors.install(app)
    app.add_middleware(Gate, api_keys=())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tandem") as http:
        return await http.get("/")


ANSWER = ["data: open", "data: 2", "data: 1", "data: 0", "data: [DONE]"]


async def test_pings_between_tokens() -> None:
    generation = Slow(0.12)
    events = (await streamed(generation, ping_seconds=0.05)).text.strip().split("\n\n")
    assert [event for event in events if event != ": ping"] == ANSWER
    assert events.count(": ping") >= 3 and generation.closed


async def test_a_stream_starts_before_the_first_token_if_that_takes_long() -> None:
    generation = Slow(0.2)
    answer = await streamed(generation, ping_seconds=0.05, first_byte_seconds=0.02)
    events = answer.text.strip().split("\n\n")
    assert events[0] == "data: open" and events[1] == ": ping"
    assert [event for event in events if event != ": ping"] == ANSWER


async def test_errors_before_and_after_the_first_byte() -> None:
    early = Slow(0, invalid("no"))
    refused = await streamed(early)
    assert refused.status_code == 400 and early.closed
    late = Slow(0.1, invalid("no"))
    answer = await streamed(late, first_byte_seconds=0.02)
    assert answer.status_code == 200 and late.closed
    events = answer.text.strip().split("\n\n")
    assert events[0] == "data: open" and '"message":"no"' in events[1] and events[2:] == ["data: [DONE]"]


async def test_a_bug_while_streaming_is_an_error_event(caplog: pytest.LogCaptureFixture) -> None:
    late = Slow(0.1, ZeroDivisionError("secret"))
    answer = await streamed(late, first_byte_seconds=0.02)
    assert '"code":"internal"' in answer.text and "secret" not in answer.text and answer.text.endswith("[DONE]\n\n")
    assert "secret" in caplog.text


async def test_an_answer_that_is_over_needs_no_collector_of_cycles() -> None:
    """Nothing of a request refers to itself: a worker with hundreds of streams would spend much of its time on that."""
    kept: list[weakref.ref[Slow]] = []
    app = FastAPI()

    @app.get("/")
    async def route(request: Request):
        generation = request.state.generation = Slow(0)
        kept.append(weakref.ref(generation))
        return await stream(request, generation, Shape(), ApiOptions(), {})

    errors.install(app)
    app.add_middleware(Gate, api_keys=())
    gc.disable()
    try:
        exchange = Exchange()
        await app(exchange.scope, exchange.receive, exchange.send)
        assert exchange.sent.decode().strip().split("\n\n") == ANSWER
        del exchange
        for _ in range(5):
            await asyncio.sleep(0)
        assert kept[0]() is None
    finally:
        gc.enable()


class Exchange:
    """One request, held together as uvicorn does it: whoever has its `send` has its scope."""

    def __init__(self) -> None:
        self.scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        self.sent, self._asked = b"", False

    async def receive(self) -> Message:
        if self._asked:
            await asyncio.Event().wait()
        self._asked = True
        return {"type": "http.request", "body": b""}

    async def send(self, message: Message) -> None:
        self.sent += message.get("body", b"")
