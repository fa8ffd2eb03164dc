"""The least that can be written with sse-starlette: an application that sends recorded bytes at a pace, and no more.

`python -m tandem.benchmarks.bench.bare PORT` serves, with uvicorn as `tandem serve` sets it up:

    POST /record            takes the events of one stream, a JSON array of strings
    POST /sse?pace=0.01     streams them, one event per 10 ms, by sse-starlette's EventSourceResponse
    POST /plain?pace=0.01   the same by starlette's StreamingResponse

All streams of one pace move together, as the sequences of an engine's step do, so that the comparison is fair: nobody
pays for timers that the other side has not got.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Pacer:
    """Wakes everybody who waits, every so often."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: list[asyncio.Future[None]] = []
        self._due = 0.0

    def next(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._due = max(self._due + self._seconds, loop.time())
            loop.call_at(self._due, self._wake)
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        return future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


async def record(request: Request) -> JSONResponse:
    request.app.state.events = [text.encode() for text in await request.json()]
    return JSONResponse({"events": len(request.app.state.events)})


def _events(request: Request) -> AsyncIterator[bytes]:
    pace = float(request.query_params["pace"])
    pacers: dict[float, Pacer] = request.app.state.pacers
    pacer = pacers.setdefault(pace, Pacer(pace))
    events: list[bytes] = request.app.state.events

    async def stream() -> AsyncIterator[bytes]:
        for event in events:
            await pacer.next()
            yield event

    return stream()


async def sse(request: Request) -> Response:
    await request.body()
    return EventSourceResponse(_events(request), sep="\n")


async def plain(request: Request) -> Response:
    await request.body()
    return StreamingResponse(_events(request), media_type="text/event-stream")


def application() -> Starlette:
    routes = [Route(f"/{route.__name__}", route, methods=["POST"]) for route in (record, sse, plain)]
    app = Starlette(routes=routes)
    app.state.pacers = {}
    return app


def main(port: int) -> None:
    uvicorn.run(
        application(), port=port, loop="uvloop", http="httptools", ws="none", log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
