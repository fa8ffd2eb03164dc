"""Answers on their way out: whole ones while watching for the client to leave, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .errors import ApiError, bug
from .generation import Generation
from .options import ApiOptions
from .protocol import StreamOptions

log = logging.getLogger(__name__)

# ASCII: readers that split at U+2028 or U+0085 too must not see them inside an event.
to_json = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
quoted = json.encoder.encode_basestring_ascii  # what `to_json` makes of a string, without the way there
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LOOKS = 4  # within each time limit of a stream: how often it is seen whether the limit is over

Result = TypeVar("Result")
Item = TypeVar("Item")
Read = TypeVar("Read", contravariant=True)
Made = TypeVar("Made", covariant=True)
First = Sequence[Any] | asyncio.Task[Sequence[Any]]  # the first step, or what waits for it


class Steps(Protocol[Made]):
    """An answer that comes piece by piece, as `Generation` is."""

    async def step(self) -> Sequence[Made]:
        """What is new; nothing at the end. Raises ApiError."""
        ...

    def close(self) -> None: ...


class Format(Protocol[Read]):
    """How a route words its stream: complete events as text."""

    def opening(self) -> str: ...

    def changes(self, news: Sequence[Read], /) -> str: ...

    def closing(self) -> str: ...


class Tails:
    """What ends every chunk after its choices; the same again and again, unless usage is told in each."""

    def __init__(self, generation: Generation, options: StreamOptions | None) -> None:
        self._generation, self._options = generation, options or StreamOptions()
        self._version = -1
        self._tail = ""

    def next(self) -> str:
        version = self._generation.weight_version
        if self._options.continuous_usage_stats:
            return self._with_usage()
        if version != self._version:
            usage = ',"usage":null' if self._options.include_usage else ""
            self._version, self._tail = version, f'],"weight_version":{version}{usage}}}\n\n'
        return self._tail

    def last(self) -> str | None:
        """Of the chunk without choices that ends a stream; None: usage is not asked for."""
        return self._with_usage() if self._options.include_usage else None

    def _with_usage(self) -> str:
        usage = to_json(self._generation.usage())
        return f'],"weight_version":{self._generation.weight_version},"usage":{usage}}}\n\n'


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result], first_seconds: float | None = None) -> Any:
    """The result of `work`, or after `first_seconds` its task. `work` is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request.receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=first_seconds, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        task.cancel()
        raise
    finally:
        gone.cancel()
    if task in done:
        return task.result()
    if gone in done:
        task.cancel()
        raise ClientDisconnect
    return task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, generation: Generation) -> None:
    """Every choice is finished after it."""
    await unless_gone(request, generation.finish())


async def stream(
    request: Request, generation: Steps[Item], shape: Format[Item], options: ApiOptions, headers: Mapping[str, str]
) -> Response:
    """Starts with the first token, so that a refusal is a status; or without one, if that takes long."""
    try:
        first = await unless_gone(request, generation.step(), options.first_byte_seconds)
    except BaseException:
        generation.close()
        raise
    return EventStream(generation, shape, first, options, headers)


def _failure(error: ApiError) -> bytes:
    return f"data: {to_json(error.body())}\n\n".encode() + DONE


class EventStream(Response):
    """Frees the engine whichever way it ends: finished, client gone, or a client that has stopped reading.

    An event is one send. One task waits for the client to leave, and one timer looks now and then whether anything has
    moved: if not, a silent stream is sent a ping, and one whose reader takes nothing is given up. What a look sees
    is old by at most a quarter of the limit. sse-starlette's response keeps four tasks and sends through six layers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Steps[Item],
        shape: Format[Item],
        first: First,
        options: ApiOptions,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers(
            {**headers, "cache-control": "no-store", "connection": "keep-alive", "x-accel-buffering": "no"}
        )
        self._generation, self._shape, self._first = generation, shape, first
        self._silence, self._patience = options.ping_seconds, options.stream_timeout
        self._moves = 0  # sends that began or ended: odd while something is being sent
        self._seen, self._since = 0, 0.0  # moves at the look before, and since when there are so many
        self._timer: asyncio.TimerHandle  # of the next look; cancelled it holds nothing
        self._ping: asyncio.Task[None] | None = None
        self._send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, request_id = asyncio.get_running_loop(), str(scope["state"]["request_id"])
        over = False  # nobody reads any more

        def end() -> None:
            nonlocal over
            over = True
            writer.cancel()

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._send = scope["state"]["send"]
        # A task of its own: every event resumes it, and the stack that led here is two dozen coroutines deep.
        writer = loop.create_task(self._answer(request_id))
        gone = loop.create_task(_left(receive))
        gone.add_done_callback(lambda left: None if left.cancelled() else end())
        self._since = loop.time()
        self._look_later(loop, request_id, end)
        try:
            await writer
        except asyncio.CancelledError:
            if not over:
                raise
        finally:
            self._timer.cancel()
            gone.cancel()
            if self._ping is not None:
                self._ping.cancel()
            if isinstance(self._first, asyncio.Task):
                self._first.cancel()
            self._generation.close()

    def _look_later(self, loop: asyncio.AbstractEventLoop, request_id: str, end: Callable[[], None]) -> None:
        pause = min(self._silence, self._patience) / LOOKS
        self._timer = loop.call_later(pause, self._look, loop, request_id, end)

    def _look(self, loop: asyncio.AbstractEventLoop, request_id: str, end: Callable[[], None]) -> None:
        now = loop.time()
        if self._moves != self._seen:
            self._seen, self._since = self._moves, now
        elif self._moves % 2 and now - self._since > self._patience:
            log.info("request %s: aborted, its reader takes nothing", request_id)
            return end()
        elif self._moves % 2 == 0 and now - self._since >= self._silence:
            self._ping = loop.create_task(self._put(PING))
        self._look_later(loop, request_id, end)

    async def _answer(self, request_id: str) -> None:
        generation, shape, first = self._generation, self._shape, self._first
        try:
            if opening := shape.opening():
                await self._put(opening.encode())
            changed = await first if isinstance(first, asyncio.Task) else first
            while changed:
                if events := shape.changes(changed):
                    if self._ping is not None:
                        await self._pinged()
                    self._moves += 1
                    await self._send({"type": "http.response.body", "body": events.encode(), "more_body": True})
                    self._moves += 1
                changed = await generation.step()
            last = shape.closing().encode() + DONE
        except ApiError as error:
            last = _failure(error)
        except Exception:
            log.exception("request %s: while streaming", request_id)
            last = _failure(bug(request_id))
        await self._pinged()
        await self._put(last, more=False)

    async def _put(self, events: bytes, more: bool = True) -> None:
        self._moves += 1
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        self._moves += 1

    async def _pinged(self) -> None:
        """A ping that is being sent is out: one thing is sent at a time."""
        if self._ping is not None:
            await self._ping
            self._ping = None


class JsonAnswer(JSONResponse):
    def __init__(self, content: object, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=dict(headers))
