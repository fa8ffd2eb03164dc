"""What travels between the API workers and the engine process, and how: msgpack over ZMQ on a Unix socket.

The engine binds `DIRECTORY/engine-EPOCH`; workers connect to it. Every engine process has its own epoch, in the
socket's name and in each message, so nothing crosses a restart. A step's outputs travel as one message per worker, each
output a row of its fields in order. The engine never waits for a worker: what a stalled worker has not taken is merged
choice by choice, so that at most one output per open choice is kept for it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from pathlib import Path
from typing import Literal, TypeVar, cast

import msgspec
import zmq

from .commands import Command, Refused
from .counts import ModelStats
from .messages import Abort, Answer, Ask, Beat, Close, Hello, News, Open, Order, Seen, Step, Submit, Told
from .request import Catalog, EngineError, Finish, Group, Output, Request
from .stream import Stream

WORKER_SHIFT = 40  # a request id is (worker number << 40) + counter
BEAT_SECONDS = 0.5
HELLO_SECONDS = 0.02
STALLED_MESSAGES = 1000  # waiting for one worker before its outputs are merged

POLLIN = int(zmq.POLLIN)  # an enum's operators take longer than a look at the socket

State = Literal["starting", "ready", "down"]
Reply = TypeVar("Reply")


class EngineUnavailable(Exception):
    """The engine takes no requests now; the text says why."""


def address(directory: Path, epoch: int) -> str:
    return f"ipc://{directory}/engine-{epoch}"


def readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(cast(int, socket.getsockopt(zmq.EVENTS)) & POLLIN)


class EngineClient:
    """An API worker's side. Everything is called on one asyncio loop; nothing here blocks.

    `state` is "starting" until the engine's catalog came, "ready" while it serves, and "down" with a `cause` while it
    is gone or while the server drains. `catalog` is the last one known, also while down.
    """

    def __init__(self, directory: Path | str, number: int = 1) -> None:
        """`number` tells this worker from all others, earlier ones included."""
        self.catalog: Catalog | None = None
        self.state: State = "starting"
        self.cause: str | None = None
        self._directory = Path(directory)
        self._number = number
        self._epoch = 0
        self._ids = itertools.count((number << WORKER_SHIFT) + 1)
        self._streams: dict[int, Stream] = {}
        self._heard = -math.inf
        self._draining = False
        self._goes_on = False  # it drains, and takes what belongs to open answers
        self._changed = asyncio.Event()
        self._asked: asyncio.Future[list[ModelStats] | None] | None = None
        self._orders: dict[int, asyncio.Future[Answer | None]] = {}  # by number; None: the engine is gone
        self._numbers = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Step | News | Beat | Told | Answer).decode

    # -- what the API uses

    def next_id(self) -> int:
        """An id for a `Request`, unique among all workers."""
        return next(self._ids)

    def submit(self, request: Request, goes_on: bool = False) -> Stream:
        """Hand a request to the engine. Refusals (full, too long, …) come as an `Output` with an error.

        Raises EngineUnavailable, with the cause as its text, unless `state` is "ready". `goes_on`: it belongs to an
        answer that began before, so that a server that drains takes it, too.
        """
        if not self._takes(goes_on) or not self._send(Submit(self._epoch, request)):
            raise EngineUnavailable(
                self.cause or ("the engine is starting" if self.state == "starting" else "no engine")
            )
        stream = self._streams[request.id] = Stream(request, self.abort)
        return stream

    def open_group(self, group: Group, goes_on: bool = False) -> None:
        """Begin a group; `close_group` in a `finally`. Why it cannot be (too long, …) is told to its members.

        Raises EngineUnavailable as `submit` does.
        """
        if not self._takes(goes_on) or not self._send(Open(self._epoch, group)):
            raise EngineUnavailable(self.cause or "the engine is starting")

    def close_group(self, group_id: int) -> None:
        """Its prompt is forgotten; members that are not finished are aborted, and their streams told so. Unknown ids do
        nothing."""
        self._send(Close(self._epoch, group_id))

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> None:
        """Stop one choice, or all. Its stream sees nothing more of it. Unknown and finished ids do nothing.

        `finish`: what the engine's metrics call that.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if stream.drop(choice):
            del self._streams[request_id]
        self._send(Abort(self._epoch, request_id, choice, finish))
        self._notify()

    async def stats(self, seconds: float) -> list[ModelStats] | None:
        """What the engine's models do and did, as of now. None: it does not say so within that time."""
        asked = self._asked
        if asked is None or asked.done():
            asked = self._asked = asyncio.get_running_loop().create_future()
            if not self._send(Ask(self._epoch, self._number)):
                asked.set_result(None)
        done, _ = await asyncio.wait({asked}, timeout=seconds)
        if not done:
            self._asked = None  # the next one asks again
            return None
        return asked.result()

    async def command(self, command: Command[Reply]) -> Reply:
        """Have the engine do it. Returns once every worker knows what has changed; that may take as long as it takes to
        receive weights. Who stops waiting does not stop the command.

        Raises Refused with the engine's reason, and EngineUnavailable as `submit` does, or when the engine dies.
        """
        number = next(self._numbers)
        if self.state != "ready" or not self._send(Order.of(self._epoch, self._number, number, command)):
            raise EngineUnavailable(self.cause or "the engine is starting")
        waiting = self._orders[number] = asyncio.get_running_loop().create_future()
        try:
            answer = await waiting
        finally:
            del self._orders[number]
        if answer is None:
            raise EngineUnavailable(self.cause or "the engine is being restarted; whether it obeyed is not known")
        if answer.error is not None:
            raise Refused(answer.error)
        return msgspec.msgpack.decode(answer.body, type=command.reply)

    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop last came around; infinite while no engine is connected.

        An idle or healthy engine beats every 0.5 s; one that hangs in a step does not.
        """
        return time.monotonic() - self._heard

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    async def wait_ready(self) -> None:
        """Return as soon as `state` is "ready". Raises EngineUnavailable when the server drains: it never will be."""
        while self.state != "ready":
            if self._draining:
                raise EngineUnavailable(self.cause)
            self._changed.clear()
            await self._changed.wait()

    async def wait_idle(self) -> None:
        """Return as soon as no stream is open."""
        while self._streams:
            self._changed.clear()
            await self._changed.wait()

    # -- what the worker tells it

    def engine_started(self, epoch: int) -> None:
        """An engine process of that epoch was started; "ready" when it has sent its catalog."""
        self._disconnect()
        self._epoch = epoch
        if not self._draining:
            self.state = "starting"
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for an engine that is not connected
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, STALLED_MESSAGES)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.ROUTING_ID, str(self._number).encode())
        socket.connect(address(self._directory, epoch))
        self._socket = socket
        asyncio.get_running_loop().add_reader(socket.fileno(), self._receive)
        self._hello(epoch)

    def engine_lost(self, cause: str) -> None:
        """The engine died: every open stream ends with an error, new requests are refused with `cause`."""
        self._disconnect()
        self._set_down(cause)
        self.fail(cause)

    def drain(self, cause: str) -> None:
        """Refuse new requests with `cause`, for good; what is open goes on."""
        self._goes_on = self.state == "ready"
        self._draining = True
        self._set_down(cause)

    def fail(self, cause: str) -> None:
        """End every open stream with an "unavailable" error and tell the engine, where there still is one."""
        self._goes_on = False
        for request_id, stream in list(self._streams.items()):
            self._send(Abort(self._epoch, request_id, None))
            stream.push(Output(request_id, finish="error", error=EngineError("unavailable", cause)))
        self._streams.clear()
        self._notify()

    def abandon(self) -> None:
        """Wait for no command any longer; those who do are told why no request is taken."""
        for waiting in self._orders.values():
            if not waiting.done():
                waiting.set_result(None)

    def close(self) -> None:
        self._disconnect()
        self._context.term()

    # -- inside

    def _takes(self, goes_on: bool) -> bool:
        return self.state == "ready" or (goes_on and self._goes_on)

    def _set_down(self, cause: str) -> None:
        self.state, self.cause = "down", cause
        self._notify()

    def _notify(self) -> None:
        self._changed.set()

    def _disconnect(self) -> None:
        self._heard = -math.inf
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)
        self.abandon()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close(linger=0)
            self._socket = None

    def _hello(self, epoch: int) -> None:
        if self._epoch == epoch and self._socket is not None and self._heard == -math.inf:
            self._send(Hello(epoch))
            asyncio.get_running_loop().call_later(HELLO_SECONDS, self._hello, epoch)

    def _send(self, message: Hello | Submit | Abort | Ask | Open | Close | Order | Seen) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.send(self._encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        asyncio.get_running_loop().call_soon(self._receive)  # sending may have used up the descriptor's one wake-up
        return True

    def _receive(self) -> None:
        """Read until nothing is left: ZMQ's descriptor tells of a change, not of every message."""
        while self._socket is not None and readable(self._socket):
            message = self._decode(self._socket.recv(zmq.DONTWAIT))
            if message.epoch != self._epoch:
                continue
            self._heard = time.monotonic()
            if isinstance(message, Step):
                self._deliver(message)
            elif isinstance(message, Told):
                if self._asked is not None and not self._asked.done():
                    self._asked.set_result(message.models)
            elif isinstance(message, Answer):
                waiting = self._orders.get(message.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            elif isinstance(message, News):
                self.catalog = message.catalog
                self._send(Seen(self._epoch, self._number, message.catalog.version))
                if not self._draining:
                    self.state, self.cause = "ready", None
                self._notify()

    def _deliver(self, step: Step) -> None:
        streams = self._streams
        for request_ids, choices, token_ids, version in step.tokens:
            for request_id, choice, token in zip(request_ids, choices, token_ids, strict=True):
                stream = streams.get(request_id)
                if stream is not None:
                    stream.push_token(choice, token, version)
        ended = False
        for output in itertools.starmap(Output, step.rows):
            stream = streams.get(output.request_id)
            if stream is not None and stream.push(output):
                del streams[output.request_id]
                ended = True
        if ended:
            self._notify()
