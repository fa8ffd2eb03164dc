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
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Literal, cast

import msgspec
import zmq

from .counts import ModelStats
from .messages import Abort, Ask, Beat, Close, Hello, News, Open, Step, Submit, Told, columns_of, row_of
from .request import Catalog, EngineError, Finish, Group, Output, Outputs, Request, Tokens
from .stream import Stream, merge

WORKER_SHIFT = 40  # a request id is (worker number << 40) + counter
BEAT_SECONDS = 0.5
RETRY_SECONDS = 0.05  # between attempts to reach a stalled worker
HELLO_SECONDS = 0.02
STALLED_MESSAGES = 1000  # waiting for one worker before its outputs are merged

State = Literal["starting", "ready", "down"]


class EngineUnavailable(Exception):
    """The engine takes no requests now; the text says why."""


def _address(directory: Path, epoch: int) -> str:
    return f"ipc://{directory}/engine-{epoch}"


def _by_worker(tokens: Tokens) -> list[tuple[int, Tokens]]:
    """What each worker gets of it."""
    ids = tokens.request_ids
    first, last = min(ids) >> WORKER_SHIFT, max(ids) >> WORKER_SHIFT
    if first == last:
        return [(first, tokens)]
    rows: dict[int, list[int]] = {}
    for row, request_id in enumerate(ids):
        rows.setdefault(request_id >> WORKER_SHIFT, []).append(row)

    def part(column: list[int], own: list[int]) -> list[int]:
        return [column[row] for row in own]

    return [
        (worker, Tokens(part(ids, own), part(tokens.choices, own), part(tokens.token_ids, own), tokens.weight_version))
        for worker, own in rows.items()
    ]


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(cast(int, socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


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
        self._changed = asyncio.Event()
        self._asked: asyncio.Future[list[ModelStats] | None] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Step | News | Beat | Told).decode

    # -- what the API uses

    def next_id(self) -> int:
        """An id for a `Request`, unique among all workers."""
        return next(self._ids)

    def submit(self, request: Request) -> Stream:
        """Hand a request to the engine. Refusals (full, too long, …) come as an `Output` with an error.

        Raises EngineUnavailable, with the cause as its text, unless `state` is "ready".
        """
        if self.state != "ready" or not self._send(Submit(self._epoch, request)):
            raise EngineUnavailable(
                self.cause or ("the engine is starting" if self.state == "starting" else "no engine")
            )
        stream = self._streams[request.id] = Stream(request, self.abort)
        return stream

    def open_group(self, group: Group) -> None:
        """Begin a group; `close_group` in a `finally`. Why it cannot be (too long, …) is told to its members.

        Raises EngineUnavailable as `submit` does.
        """
        if self.state != "ready" or not self._send(Open(self._epoch, group)):
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
        socket.connect(_address(self._directory, epoch))
        self._socket = socket
        asyncio.get_running_loop().add_reader(socket.fileno(), self._receive)
        self._hello(epoch)

    def engine_lost(self, cause: str) -> None:
        """The engine died: every open stream ends with an error, new requests are refused with `cause`."""
        self._disconnect()
        self._set_down(cause)
        self.fail(cause)

    def drain(self, cause: str) -> None:
        """Refuse new requests with `cause`, for good; open streams go on."""
        self._draining = True
        self._set_down(cause)

    def fail(self, cause: str) -> None:
        """End every open stream with an "unavailable" error and tell the engine, where there still is one."""
        for request_id, stream in list(self._streams.items()):
            self._send(Abort(self._epoch, request_id, None))
            stream.push(Output(request_id, finish="error", error=EngineError("unavailable", cause)))
        self._streams.clear()
        self._notify()

    def close(self) -> None:
        self._disconnect()
        self._context.term()

    # -- inside

    def _set_down(self, cause: str) -> None:
        self.state, self.cause = "down", cause
        self._notify()

    def _notify(self) -> None:
        self._changed.set()

    def _disconnect(self) -> None:
        self._heard = -math.inf
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close(linger=0)
            self._socket = None

    def _hello(self, epoch: int) -> None:
        if self._epoch == epoch and self._socket is not None and self._heard == -math.inf:
            self._send(Hello(epoch))
            asyncio.get_running_loop().call_later(HELLO_SECONDS, self._hello, epoch)

    def _send(self, message: Hello | Submit | Abort | Ask | Open | Close) -> bool:
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
        while self._socket is not None and _readable(self._socket):
            message = self._decode(self._socket.recv(zmq.DONTWAIT))
            if message.epoch != self._epoch:
                continue
            self._heard = time.monotonic()
            if isinstance(message, Step):
                self._deliver(message)
            elif isinstance(message, Told):
                if self._asked is not None and not self._asked.done():
                    self._asked.set_result(message.models)
            elif isinstance(message, News):
                self.catalog = message.catalog
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


class EngineServer:
    """The engine's side: requests and aborts in, outputs, catalog and heartbeats out. Not thread-safe."""

    def __init__(
        self, directory: Path | str, epoch: int, wake: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Binds at once, so that workers may come before the models are loaded. `wake`: a descriptor whose
        readability also ends a `receive` that waits."""
        self._epoch = epoch
        self._clock = clock
        self._catalog: Catalog | None = None
        self._beaten = self._retried = -math.inf
        self._open: dict[int, dict[int, set[int]]] = {}  # worker -> request id -> unfinished choices
        self._backlog: dict[int, dict[tuple[int, int], Output]] = {}  # of stalled workers
        self._behind: set[int] = set()  # workers that have not got the catalog
        self._groups: dict[int, set[int]] = {}  # worker -> open groups
        self._orphans: list[Abort | Close] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a worker that is gone shows as an error, not as silence
        self._socket.setsockopt(zmq.SNDHWM, STALLED_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(_address(Path(directory), epoch))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if wake is not None:
            self._poller.register(wake, zmq.POLLIN)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Hello | Submit | Abort | Ask | Open | Close).decode

    def receive(self, timeout: float = 0.0) -> list[Request | Abort | Ask | Group | Close]:
        """What came in, in order; waits up to `timeout` seconds when nothing has. The requests of a worker that is
        gone come as aborts, and its groups close."""
        if timeout and not self._orphans:
            self._poller.poll(int(timeout * 1000))
        arrived: list[Request | Abort | Ask | Group | Close] = [*self._orphans]
        self._orphans.clear()
        while _readable(self._socket):
            identity, payload = self._socket.recv_multipart(zmq.DONTWAIT)
            message, worker = self._decode(payload), int(identity)
            if message.epoch != self._epoch:
                continue
            opened = self._open.setdefault(worker, {})
            if isinstance(message, Submit):
                opened[message.request.id] = set(range(message.request.n))
                arrived.append(message.request)
            elif isinstance(message, Abort):
                self._finished(message.request_id, message.choice)
                arrived.append(message)
            elif isinstance(message, Ask):
                arrived.append(message)
            elif isinstance(message, Open):
                self._groups.setdefault(worker, set()).add(message.group.id)
                arrived.append(message.group)
            elif isinstance(message, Close):
                self._groups.get(worker, set()).discard(message.group_id)
                arrived.append(message)
            else:
                self._behind.add(worker)
                self._inform()
        return arrived

    def send(self, outputs: Outputs) -> None:
        """One message per worker."""
        by_worker: dict[int, Outputs] = {}
        for tokens in outputs.tokens:
            for worker, own in _by_worker(tokens):
                by_worker.setdefault(worker, Outputs()).tokens.append(own)
        for output in outputs.others:
            by_worker.setdefault(output.request_id >> WORKER_SHIFT, Outputs()).others.append(output)
            if output.finish is not None or output.error is not None:
                self._finished(output.request_id, None if output.error is not None else output.choice)
        for worker, own in by_worker.items():
            if worker in self._open and (worker in self._backlog or not self._post(worker, self._packed(own))):
                self._keep(worker, own)

    def tell(self, worker: int, models: list[ModelStats]) -> None:
        """Answers an `Ask`; a worker that takes nothing now will ask again."""
        self._post(worker, self._encode(Told(self._epoch, models)))

    def publish(self, catalog: Catalog) -> None:
        """From now on every worker, present or to come, knows this catalog."""
        self._catalog = catalog
        self._behind = set(self._open)
        self._inform()

    def beat(self) -> bool:
        """Called by the engine's loop on every turn. Every `BEAT_SECONDS` it tells the workers, finds the dead ones,
        and returns True."""
        now = self._clock()
        if self._backlog and now - self._retried >= RETRY_SECONDS:
            self._retried = now
            for worker, backlog in list(self._backlog.items()):
                if self._post(worker, self._packed(Outputs(list(backlog.values())))):
                    self._backlog.pop(worker, None)
        if now - self._beaten < BEAT_SECONDS:
            return False
        self._beaten = now
        self._inform()
        message = self._encode(Beat(self._epoch))
        for worker in list(self._open):
            self._post(worker, message)
        return True

    def close(self) -> None:
        self._socket.close(linger=500)
        self._context.term()

    def _packed(self, outputs: Outputs) -> bytes:
        return self._encode(Step(self._epoch, list(map(row_of, outputs.others)), list(map(columns_of, outputs.tokens))))

    def _post(self, worker: int, message: bytes) -> bool:
        """False: the worker is alive but takes no more now."""
        try:
            self._socket.send_multipart((str(worker).encode(), message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._backlog.pop(worker, None)
            opened = self._open.pop(worker, {})
            self._orphans += [Abort(self._epoch, request_id, None) for request_id in opened]
            self._orphans += [Close(self._epoch, group_id) for group_id in self._groups.pop(worker, set())]
        return True

    def _inform(self) -> None:
        """Send the catalog to those that have not got it."""
        if self._catalog is not None and self._behind:
            message = self._encode(News(self._epoch, self._catalog))
            self._behind = {worker for worker in self._behind if not self._post(worker, message)}

    def _keep(self, worker: int, outputs: Outputs) -> None:
        """Merge into what a stalled worker has to get."""
        backlog = self._backlog.setdefault(worker, {})
        for output in outputs:
            key = (output.request_id, output.choice)
            if key in backlog:
                merge(backlog[key], output)
            else:
                backlog[key] = deepcopy(output)  # `merge` writes into it; its lists may be the engine's

    def _finished(self, request_id: int, choice: int | None) -> None:
        opened = self._open.get(request_id >> WORKER_SHIFT, {})
        unfinished = opened.get(request_id)
        if unfinished is None:
            return
        unfinished.discard(-1 if choice is None else choice)
        if choice is None or not unfinished:
            del opened[request_id]
