"""Starts the engine process and the API workers, watches, restarts and drains them. Imports no torch and no web."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import FrameType, MappingProxyType
from typing import Any

from .engine.control import Drain, EngineLost, EngineStarted, Failed, Ready, Standing, StartEngine, Stop
from .options import METRICS_DIRECTORY, ServeOptions, StartWorker

ENGINE = "tandem.server.engine_process"
WORKER = "tandem.server.worker"

# What the C libraries of a child are told. OpenMP threads that spin for long take the cores from whoever has work: on
# two busy cores a decode step took nine times as long. Asleep at once they cost a wake-up per operation (PyTorch's own;
# the C++ kernels have threads of their own). Weights and KV cache in large pages: batch 1 takes 7 % less time.
LIBRARIES = MappingProxyType(
    {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
)

CRASHES = 5  # so many within CRASH_SECONDS, and the server gives up
CRASH_SECONDS = 60.0
FIRST_PAUSE = 0.1  # seconds before a restart, doubled with every crash that is remembered
FLUSH_SECONDS = 5.0  # beyond the drain, for error events and closing connections
STOP_SECONDS = 2.0

log = logging.getLogger(__name__)


class CannotServe(Exception):
    """A start that cannot succeed; the text is the last line that the user sees."""


@dataclass(eq=False, slots=True)
class Child:
    """A process, the channel to it, and what it said."""

    name: str
    process: subprocess.Popen[bytes]
    channel: Connection[object, object]
    exit_descriptor: int  # readable when the process has ended
    ready: Ready | None = None
    failed: Failed | None = None
    standing: Standing | None = None  # the engine's
    hung_up: bool = False

    @classmethod
    def start(
        cls, name: str, module: str, order: object, descriptors: tuple[int, ...] = (), **environment: str
    ) -> Child:
        """Must be called on the main thread: the kernel ends the child when the *thread* that started it ends."""
        ours, theirs = Pipe()
        variables = {**LIBRARIES, **os.environ, **environment}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
                env=variables,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *descriptors),
                process_group=0,  # Ctrl-C is for the supervisor alone
            )
        child = cls(name, process, ours, os.pidfd_open(process.pid))
        child.send(order)
        return child

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it just died; its exit is handled where exits are
            self.channel.send(message)

    def listen(self) -> None:
        """Take in all that it has said."""
        try:
            while self.channel.poll():
                message = self.channel.recv()
                if isinstance(message, Ready):
                    self.ready = message
                elif isinstance(message, Failed):
                    self.failed = message
                elif isinstance(message, Standing):
                    self.standing = message
        except (EOFError, OSError):
            self.hung_up = True

    def end(self, seconds: float = 0.0) -> None:
        """Wait that long for it to end by itself, then kill it; give back what it held."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
        os.close(self.exit_descriptor)

    @property
    def cause(self) -> str:
        """Why it ended, in words."""
        if self.failed is not None:
            return self.failed.cause
        status = self.process.returncode
        if status < 0:
            return f"the {self.name} process was killed by {signal.Signals(-status).name}"
        return f"the {self.name} process exited with status {status}"


@dataclass(slots=True)
class Crashes:
    """Decides when a process that keeps dying is started again, and when no more."""

    times: list[float] = field(default_factory=list[float])

    def add(self, now: float) -> float | None:
        """Seconds to wait before the restart; None: it died too often."""
        self.times = [*(then for then in self.times if now - then < CRASH_SECONDS), now]
        return None if len(self.times) > CRASHES else FIRST_PAUSE * 2 ** (len(self.times) - 1)


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`, all on one port (`port` 0: a free one). Raises CannotServe."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotServe(f"--host {host}: {error.strerror}") from None
    refused: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listener: socket.socket | None = None
        try:
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.listen(2048)
        except OSError as error:
            refused = refused or error
            if listener is not None:
                listener.close()
            continue
        port = port or listener.getsockname()[1]
        sockets.append(listener)
    if refused is not None and (not sockets or refused.errno == errno.EADDRINUSE):
        for listener in sockets:
            listener.close()
        raise CannotServe(
            f"cannot listen on {host} port {port}: {refused.strerror}; choose another with --port or --host"
        )
    return sockets


class Supervisor:
    """One server's life. `run` returns the exit status; what ended it badly is the last line on stderr."""

    def __init__(
        self,
        options: ServeOptions,
        sockets: list[socket.socket],
        on_serving: Callable[[Ready], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._sockets = sockets
        self._on_serving = on_serving
        self._clock = clock
        self._directory = tempfile.mkdtemp(prefix="tandem-")  # for its owner alone
        self._engine: Child | None = None
        self._engine_loss: str | None = None  # why there is none
        self._engine_due: float | None = None  # when to start the next one
        self._engine_crashes = Crashes()
        self._epoch = 0
        self._standing: Standing | None = None  # at which an engine served last
        self._workers: list[Child] = []
        self._workers_due: list[float] = []
        self._worker_crashes = Crashes()
        self._number = 0
        self._serving = False
        self._drained_by: float | None = None  # set while draining: the latest end
        self._status: int | None = None
        self._cause: str | None = None
        self._signals: list[int] = []

    def run(self) -> int:
        awake, wake = socket.socketpair()
        for end in (awake, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        try:
            self._start_engine()
            for _ in range(self._options.api_workers):
                self._start_worker()
            while self._status is None:
                self._wait(awake)
                self._turn()
        finally:
            self._end_all()
            signal.set_wakeup_fd(-1)
            awake.close()
            wake.close()
        if self._cause is not None:
            print(f"tandem serve: {self._cause}", file=sys.stderr, flush=True)
        return self._status

    def _wait(self, awake: socket.socket) -> None:
        """Until something happens or is due; takes in what the children say."""
        children = [*self._workers, *([self._engine] if self._engine else [])]
        due = [*self._workers_due, *(time for time in (self._engine_due, self._drained_by) if time is not None)]
        sources: list[Any] = [awake, *(child.exit_descriptor for child in children)]
        sources += [child.channel for child in children if not child.hung_up]
        happened = wait(sources, max(0.0, min(due) - self._clock()) if due else None)
        if awake in happened:
            awake.recv(4096)
        for child in children:
            if child.channel in happened or child.exit_descriptor in happened:
                child.listen()

    def _turn(self) -> None:
        """React to all that has changed."""
        while self._signals and self._status is None:
            self._handle_signal(self._signals.pop(0))
        if self._engine is not None and self._engine.process.poll() is not None:
            self._engine_ended(self._engine)
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._worker_ended(worker)
        if self._status is not None:
            return
        now = self._clock()
        if self._drained_by is not None:
            if not self._workers or now >= self._drained_by:
                self._status = 0
            return
        if self._engine_due is not None and now >= self._engine_due:
            self._start_engine()
        while self._workers_due and now >= min(self._workers_due):
            self._workers_due.remove(min(self._workers_due))
            self._start_worker()
        if self._engine is not None and self._engine.standing is not None:
            self._standing = self._engine.standing
        if (
            not self._serving
            and self._engine is not None
            and self._engine.ready
            and self._standing
            and all(w.ready for w in self._workers)
        ):
            self._serving = True
            self._on_serving(self._engine.ready)

    def _start_engine(self) -> None:
        self._epoch += 1
        self._engine_due = None
        options = self._options
        order = StartEngine(
            self._directory, self._epoch, options.models, options.engine, options.log_level, self._standing
        )
        self._engine = Child.start("engine", ENGINE, order)
        self._tell_workers(EngineStarted(self._epoch))

    def _start_worker(self) -> None:
        self._number += 1
        descriptors = tuple(listener.fileno() for listener in self._sockets)
        order = StartWorker(self._directory, self._number, descriptors, self._options)
        worker = Child.start(f"api-{self._number}", WORKER, order, descriptors, **{METRICS_DIRECTORY: self._directory})
        self._workers.append(worker)
        worker.send(EngineStarted(self._epoch) if self._engine is not None else EngineLost(self._engine_loss or ""))

    def _tell_workers(self, message: object) -> None:
        for worker in self._workers:
            worker.send(message)

    def _engine_ended(self, engine: Child) -> None:
        engine.listen()
        self._standing = engine.standing or self._standing
        engine.end()
        self._engine = None
        cause = engine.cause
        if self._drained_by is not None:
            self._tell_workers(EngineLost(cause))
        elif self._standing is None:
            self._give_up(cause)
        elif engine.failed is not None and engine.failed.lost:
            self._engine_loss = cause
            self._tell_workers(EngineLost(cause))
            log.error("%s", cause)
        else:
            pause = self._engine_crashes.add(self._clock())
            if pause is None:
                self._give_up(f"the engine died {CRASHES + 1} times within {CRASH_SECONDS:.0f} s, lastly: {cause}")
                return
            self._engine_loss = f"{cause}; it is being restarted"
            self._engine_due = self._clock() + pause
            self._tell_workers(EngineLost(self._engine_loss))
            log.error("%s (in %.1f s)", self._engine_loss, pause)

    def _worker_ended(self, worker: Child) -> None:
        worker.listen()
        worker.end()
        self._workers.remove(worker)
        if self._drained_by is not None:
            return
        if not self._serving:
            self._give_up(worker.cause)
            return
        pause = self._worker_crashes.add(self._clock())
        if pause is None:
            self._give_up(f"API workers died {CRASHES + 1} times within {CRASH_SECONDS:.0f} s, lastly: {worker.cause}")
            return
        self._workers_due.append(self._clock() + pause)
        log.error("%s; another is started in %.1f s", worker.cause, pause)

    def _give_up(self, cause: str) -> None:
        if self._status is None:
            self._status, self._cause = 1, cause

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _handle_signal(self, number: int) -> None:
        if self._drained_by is not None:
            self._status = 128 + number
        elif not self._serving:
            self._status = 0
        else:
            seconds = self._options.drain_seconds
            log.info("%s: draining for up to %.0f s; once more ends at once", signal.Signals(number).name, seconds)
            self._drained_by = self._clock() + seconds + FLUSH_SECONDS
            self._engine_due = None
            self._workers_due.clear()
            self._tell_workers(Drain(seconds))

    def _end_all(self) -> None:
        for listener in self._sockets:
            listener.close()
        for worker in self._workers:
            worker.process.kill()
        if self._engine is not None:
            if self._status == 0 and self._engine.ready is not None:
                self._engine.send(Stop())
            else:
                self._engine.process.kill()
        for child in [*self._workers, *([self._engine] if self._engine else [])]:
            child.end(STOP_SECONDS)
        shutil.rmtree(self._directory, ignore_errors=True)


def process_age() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    with open("/proc/self/stat") as stat:
        started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
