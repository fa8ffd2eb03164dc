"""Answers on their way out: whole ones while watching for the client to leave, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from .choices import Choice
from .errors import ApiError, bug
from .generation import Generation
from .options import ApiOptions
from .protocol import StreamOptions

log = logging.getLogger(__name__)

# ASCII: readers that split at U+2028 or U+0085 too must not see them inside an event.
to_json = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")
First = list[Choice] | asyncio.Task[list[Choice]]  # the first step of a generation, or what waits for it


class Format(Protocol):
    """How a route words its stream: complete events as text."""

    def opening(self) -> str: ...

    def changes(self, choices: Iterable[Choice]) -> str: ...

    def closing(self) -> str: ...


def tail_of(generation: Generation, options: StreamOptions, last: bool = False) -> str:
    """What ends every chunk after its choices."""
    usage = ""
    if last or options.continuous_usage_stats:
        usage = f',"usage":{to_json(generation.usage())}'
    elif options.include_usage:
        usage = ',"usage":null'
    return f'],"weight_version":{generation.weight_version}{usage}}}\n\n'


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result], first_seconds: float | None = None) -> Any:
    """The result of `work`, or after `first_seconds` its task. `work` is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
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


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, generation: Generation) -> None:
    """Every choice is finished after it."""
    await unless_gone(request, generation.finish())


async def stream(
    request: Request, generation: Generation, shape: Format, options: ApiOptions, headers: Mapping[str, str]
) -> Response:
    """Starts with the first token, so that a refusal is a status; or without one, if that takes long."""
    try:
        first = await unless_gone(request, generation.step(), options.first_byte_seconds)
    except BaseException:
        generation.close()
        raise
    events = _events(first, generation, shape, request.state.request_id)
    return EventStream(events, generation, first, options, headers)


async def _events(first: First, generation: Generation, shape: Format, request_id: str) -> AsyncIterator[bytes]:
    try:
        yield shape.opening().encode()
        changed = await first if isinstance(first, asyncio.Task) else first
        while changed:
            if events := shape.changes(changed):
                yield events.encode()
            changed = await generation.step()
        yield shape.closing().encode() + DONE
    except ApiError as error:
        yield _failure(error)
    except Exception:
        log.exception("request %s: while streaming", request_id)
        yield _failure(bug(request_id))


def _failure(error: ApiError) -> bytes:
    return f"data: {to_json(error.body())}\n\n".encode() + DONE


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


class EventStream(EventSourceResponse):
    """Frees the engine whichever way it ends: finished, client gone, or a client that has stopped reading.

    The base class could time each send out, at 30 µs an event; one timer per stream that looks now and then costs none.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        generation: Generation,
        first: First,
        options: ApiOptions,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType] - a bare dict in its annotation
            events,
            headers=headers,
            ping=options.ping_seconds,
            ping_message_factory=_ping,
            sep="\n",
        )
        self._generation = generation
        self._first = first
        self._patience = options.stream_timeout
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stuck = False

        async def timed(message: Message) -> None:
            self._sending_since = loop.time()
            await send(message)
            self._sending_since = None

        def watch() -> None:
            nonlocal stuck, timer
            stuck = self._sending_since is not None and loop.time() - self._sending_since > self._patience
            if stuck:
                task.cancel()
            else:
                timer = loop.call_later(self._patience / 4, watch)

        timer = loop.call_later(self._patience / 4, watch)
        try:
            await super().__call__(scope, receive, timed)
        except asyncio.CancelledError:
            if not stuck or task.uncancel():
                raise
            log.info("request %s: aborted, its reader takes nothing", scope["state"]["request_id"])
        finally:
            timer.cancel()
            if isinstance(self._first, asyncio.Task):
                self._first.cancel()
            self._generation.close()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)

    async def _listen_for_exit_signal(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The worker drains: it lets streams end by themselves, then ends them with an error event."""
        await asyncio.Event().wait()


class JsonAnswer(JSONResponse):
    def __init__(self, content: object, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=dict(headers))
