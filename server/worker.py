"""An API worker: the HTTP application on the listening sockets that the supervisor opened. Imports no torch.

Started by the supervisor as `python -m tandem.server.worker DESCRIPTOR PARENT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from collections.abc import Generator
from multiprocessing.connection import Connection

import uvicorn
import uvloop

from .api.app import create_app
from .engine.control import Drain, EngineLost, EngineStarted, Failed, Ready, enter, log_to_stderr
from .engine.link import EngineClient, EngineUnavailable
from .engine.options import owner_of
from .engine.request import ModelCard
from .options import METRICS_DIRECTORY, ServeOptions, StartWorker
from .text.text import Text

FLUSH_SECONDS = 3  # for answers that are written and not yet read
CATALOG_SECONDS = 0.5  # for an engine that serves already to answer
KEEP_ALIVE_SECONDS = 65  # longer than the pools of common clients and proxies keep a connection

# gc.set_threshold: answers leave no cycles behind, and hundreds of open ones are not walked over at every 700th object.
COLLECTIONS = (10_000, 20, 50)

log = logging.getLogger(__name__)


class Texts:
    """Tokenizer and template of every hosted model; those that are told the same share one `Text`."""

    def __init__(self, options: ServeOptions) -> None:
        self._told: dict[str, tuple[str | None, ...]] = {}
        self._texts: dict[tuple[str | None, ...], Text] = {}
        for spec in options.models:
            owner = owner_of(spec, options.models)
            own, owners = ((one.chat_template, one.tool_call_parser, one.reasoning_parser) for one in (spec, owner))
            told = self._told[spec.name] = tuple(mine or other for mine, other in zip(own, owners, strict=True))
            self._load(owner.text_path, *told)

    def __call__(self, card: ModelCard) -> Text:
        return self._load(card.path, *self._told.get(card.parent or card.name, (None, None, None)))

    def _load(self, path: str, *told: str | None) -> Text:
        text = self._texts.get((path, *told))
        if text is None:
            text = self._texts[path, *told] = Text.load(path, *told)
        return text


class Server(uvicorn.Server):
    """Leaves signals alone: the supervisor's messages say when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Worker:
    def __init__(self, order: StartWorker, control: Connection[object, object]) -> None:
        options = order.options
        self._control = control
        self._client = EngineClient(order.directory, order.number)
        texts = Texts(options)
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in order.descriptors]
        self._server = Server(
            uvicorn.Config(
                create_app(
                    self._client,
                    texts,
                    options.api,
                    settings=options.shown(),
                    metrics_directory=os.environ.get(METRICS_DIRECTORY),
                ),
                loop="uvloop",
                http="httptools",
                ws="none",
                log_config=None,
                access_log=options.access_log,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control.fileno(), self._listen)
        with contextlib.suppress(
            TimeoutError, EngineUnavailable
        ):  # a worker that replaces another need not refuse its first requests
            await asyncio.wait_for(self._client.wait_ready(), CATALOG_SECONDS)
        serving = asyncio.create_task(self._server.serve(self._sockets))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.002)
        gc.freeze()
        gc.set_threshold(*COLLECTIONS)
        self._control.send(Ready())
        await serving
        loop.remove_reader(self._control.fileno())
        self._client.close()

    def _listen(self) -> None:
        """Take the supervisor's messages; without a supervisor there is nothing left to do."""
        try:
            while self._control.poll():
                message = self._control.recv()
                if isinstance(message, EngineStarted):
                    self._client.engine_started(message.epoch)
                elif isinstance(message, EngineLost):
                    self._client.engine_lost(message.cause)
                elif isinstance(message, Drain):
                    self._draining = asyncio.create_task(self._drain(message.seconds))
        except (EOFError, OSError):
            os._exit(1)

    async def _drain(self, seconds: float) -> None:
        self._client.drain("the server is shutting down")
        try:
            await asyncio.wait_for(self._client.wait_idle(), seconds)
        except TimeoutError:
            log.warning("%d requests did not finish within %.0f s", self._client.open_streams, seconds)
            self._client.fail(f"the server is shutting down and ended this request after {seconds:.0f} s")
        self._client.abandon()
        self._server.should_exit = True


def main(descriptor: int, parent: int) -> int:
    control = enter("api", descriptor, parent)
    order = control.recv()
    assert isinstance(order, StartWorker)
    log_to_stderr(f"api-{order.number}", order.options.log_level)
    if order.options.log_level == "info":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and end are told by the supervisor
    try:
        worker = Worker(order, control)
        uvloop.run(worker.run())
    except Exception as error:
        log.debug("", exc_info=True)
        control.send(Failed(f"API worker: {error or type(error).__name__}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
