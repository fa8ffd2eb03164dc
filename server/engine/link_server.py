"""The engine's end of the link: one socket for all workers. See `link.py` for what travels and how."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import msgspec
import zmq

from .counts import ModelStats
from .link import BEAT_SECONDS, STALLED_MESSAGES, WORKER_SHIFT, address, readable
from .messages import (
    Abort,
    Answer,
    Ask,
    Beat,
    Close,
    Hello,
    News,
    Open,
    Order,
    Seen,
    Step,
    Submit,
    Told,
    columns_of,
    row_of,
)
from .request import Catalog, Group, Output, Outputs, Request, Tokens
from .stream import merge

NOW, NOW_AND_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
RETRY_SECONDS = 0.05  # between attempts to reach a stalled worker
SEEN_SECONDS = 5.0  # for which a command's answer waits for a worker that is there but takes no catalog

Incoming = Request | Abort | Ask | Group | Close | Order


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
        self._behind: set[int] = set()  # workers that have not been sent the catalog
        self._seen: dict[int, int] = {}  # worker -> version of the catalog that it has
        self._answers: list[tuple[Order, object, float]] = []  # with the latest moment to give them
        self._groups: dict[int, set[int]] = {}  # worker -> open groups
        self._orphans: list[Abort | Close] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a worker that is gone shows as an error, not as silence
        self._socket.setsockopt(zmq.SNDHWM, STALLED_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address(Path(directory), epoch))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if wake is not None:
            self._poller.register(wake, zmq.POLLIN)
        self._together: list[int] | None = None  # requests of one worker, the last such list that came
        self._worker = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Hello | Submit | Abort | Ask | Open | Close | Order | Seen).decode

    def receive(self, timeout: float = 0.0) -> list[Incoming]:
        """What came in, in order; waits up to `timeout` seconds when nothing has. The requests of a worker that is
        gone come as aborts, and its groups close."""
        if timeout and not self._orphans:
            self._poller.poll(int(timeout * 1000))
        arrived: list[Incoming] = [*self._orphans]
        self._orphans.clear()
        while readable(self._socket):
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
            elif isinstance(message, Ask | Order):
                arrived.append(message)
            elif isinstance(message, Seen):
                self._seen[worker] = message.version
                self._reply()
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
            parts = _by_worker(tokens) if tokens.request_ids is not self._together else [(self._worker, tokens)]
            if len(parts) == 1:
                self._together, self._worker = tokens.request_ids, parts[0][0]
            for worker, own in parts:
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

    def answer(self, order: Order, outcome: object) -> None:
        """A reply or an EngineError, sent once every worker has the catalog as it is now. Nobody waits for one that is
        gone, or for one that has taken nothing for `SEEN_SECONDS`."""
        self._answers.append((order, outcome, self._clock() + SEEN_SECONDS))
        self._reply()

    def publish(self, catalog: Catalog) -> None:
        """From now on every worker, present or to come, knows this catalog."""
        self._catalog = catalog
        self._behind = set(self._open)
        self._inform()

    def beat(self) -> bool:
        """Called by the engine's loop on every turn. Every `BEAT_SECONDS` it tells the workers, finds the dead ones,
        and returns True."""
        now = self._clock()
        if self._answers:
            self._reply()
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
            self._socket.send(str(worker).encode(), NOW_AND_MORE)
            self._socket.send(message, NOW)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._backlog.pop(worker, None)
            self._seen.pop(worker, None)
            opened = self._open.pop(worker, {})
            self._orphans += [Abort(self._epoch, request_id, None) for request_id in opened]
            self._orphans += [Close(self._epoch, group_id) for group_id in self._groups.pop(worker, set())]
        return True

    def _inform(self) -> None:
        """Send the catalog to those that have not got it."""
        if self._catalog is not None and self._behind:
            message = self._encode(News(self._epoch, self._catalog))
            self._behind = {worker for worker in self._behind if not self._post(worker, message)}

    def _reply(self) -> None:
        """Send the answers that nothing holds back."""
        version = 0 if self._catalog is None else self._catalog.version
        informed = all(self._seen.get(worker, 0) >= version for worker in self._open)
        left: list[tuple[Order, object, float]] = []
        for order, outcome, latest in self._answers:
            message = self._encode(Answer.of(self._epoch, order.number, outcome))
            if not (informed or self._clock() >= latest) or not self._post(order.worker, message):
                left.append((order, outcome, latest))
        self._answers = left

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
