"""The engine process: a `Hub` stepped in a loop between what comes in over the link and what goes out.

Started by `server/engine_process.py`. torch is imported once the start order is in and the link's socket is bound, so
workers may come at any time.
"""

from __future__ import annotations

import gc
import importlib
import logging
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from .control import Failed, HostedModel, Ready, StartEngine, Stop, as_flags, enter, log_to_stderr
from .link import BEAT_SECONDS
from .link_server import EngineServer
from .messages import Ask, Close, Order
from .options import OptionsError
from .request import EngineError, Group, ModelCard, Output, Request

if TYPE_CHECKING:
    from .administration import Task
    from .guides import LoadGrammars
    from .hub import Hub

ORDERED_SECONDS = 0.002  # between two looks at a command that waits, where nothing else is to do

log = logging.getLogger(__name__)


def load(order: StartEngine, grammars: LoadGrammars | None = None) -> Hub:
    """Raises what `Hub.load` raises; on a restart WeightsLost where the weights that were served last are gone."""
    from ...model.errors import CheckpointError
    from .hub import Hub
    from .standing import WeightsLost, restore

    if order.standing is None:
        return Hub.load(order.models, order.options, epoch=order.epoch, grammars=grammars)
    try:
        hub = Hub.load(order.models, order.options, epoch=order.epoch, grammars=grammars)
    except (CheckpointError, OSError) as error:
        raise WeightsLost(f"weights lost: {error}") from error
    restore(hub, order.standing)
    return hub


def serve(hub: Hub, server: EngineServer, control: Connection[object, object]) -> None:
    """Until the supervisor says stop."""
    catalog = hub.catalog
    orders: list[tuple[Order, Task]] = []
    control.send(hub.standing)
    server.publish(catalog)
    while True:
        busy = hub.has_work
        early: list[Output] = []
        pause = ORDERED_SECONDS if orders else BEAT_SECONDS
        for message in server.receive(0.0 if busy or hub.idle() else pause):
            if isinstance(message, Request):
                early += _submit(hub, message)
            elif isinstance(message, Ask):
                server.tell(message.worker, hub.stats())
            elif isinstance(message, Group):
                early += _open(hub, message)
            elif isinstance(message, Close):
                early += hub.close(message.group_id)
            elif isinstance(message, Order):
                orders.append((message, hub.order(message.command)))
            else:
                early += hub.abort(message.request_id, message.choice, message.finish)
        early += hub.expire(time.monotonic())
        if orders:
            hub.turn()
        if hub.catalog is not catalog:
            catalog = hub.catalog
            control.send(hub.standing)  # before anybody hears of it
            server.publish(catalog)
        for order, task in orders:
            if task.done:
                server.answer(order, task.outcome)
        orders = [(order, task) for order, task in orders if not task.done]
        outputs = hub.step()
        outputs.others += early
        if outputs:
            server.send(outputs)
        if (server.beat() or not busy) and control.poll() and isinstance(control.recv(), Stop):
            return


def _submit(hub: Hub, request: Request) -> list[Output]:
    """One request can break nothing but its own answer."""
    try:
        return hub.submit(request)
    except Exception as error:
        log.exception("request %d could not be taken", request.id)
        what = f"the engine could not take this request ({type(error).__name__}); the log has the traceback"
        return [*hub.abort(request.id), Output(request.id, finish="error", error=EngineError("internal", what))]


def _open(hub: Hub, group: Group) -> list[Output]:
    """One group can break nothing but its own members. Where its id is taken, the other one ends as well: nobody could
    say behind which prompt a member belongs."""
    try:
        hub.open(group)
    except Exception:
        log.exception("group %d could not be opened", group.id)
        return hub.close(group.id)
    return []


def hosted(hub: Hub) -> tuple[HostedModel, ...]:
    return tuple(
        HostedModel(
            name=engine.card.name,
            role=engine.card.role,
            architecture=engine.card.architecture,
            head=shown_head(engine.card),
            shares=engine.card.shares,
            dtype=engine.card.precision,
            context=engine.card.context,
            weight_bytes=engine.weight_bytes,
            kv_pages=engine.kv_pages,
            kv_tokens=engine.kv_tokens,
            kv_bytes=engine.kv_bytes,
            kv_most_tokens=engine.kv_most_tokens,
            digest=engine.digest,
        )
        for engine in hub.engines
    )


def shown_head(card: ModelCard) -> str:
    """What the head is, and where it is read."""
    return ", ".join(filter(None, (card.head, card.pooling, "every token" if card.gives == "values" else "")))


def explain(error: Exception) -> Failed:
    """What kept the engine from starting, as the last line that the user sees."""
    from .standing import WeightsLost

    text = as_flags(str(error)) if isinstance(error, OptionsError) else str(error)
    if not isinstance(error, (ValueError, OSError, WeightsLost)):
        log.error("the engine cannot start", exc_info=error)
        text = f"{type(error).__name__}: {text}"
    return Failed(text or type(error).__name__, lost=isinstance(error, WeightsLost))


def main(descriptor: int, parent: int, grammars: LoadGrammars) -> int:
    began = time.monotonic()
    control = enter("engine", descriptor, parent)
    order = control.recv()
    assert isinstance(order, StartEngine)
    log_to_stderr("engine", order.log_level)
    server = EngineServer(order.directory, order.epoch, wake=control.fileno())
    gc.disable()  # importing torch makes objects and no garbage: 0.15 s less
    try:
        importlib.import_module("torch")  # by itself, because it is the longest part of a start
        imported = time.monotonic()
        hub = load(order, grammars)
        gc.freeze()  # what stays for good is not walked over between steps
        gc.enable()
        seconds = {"import torch": imported - began, "load": time.monotonic() - imported}
        control.send(Ready(hosted(hub), hub.division, seconds))
    except Exception as error:
        control.send(explain(error))
        return 1
    try:
        serve(hub, server, control)
    except Exception as error:  # a bug, whatever its type: the user did nothing wrong
        log.exception("the engine's loop failed")
        control.send(Failed(f"the engine failed: {type(error).__name__}: {error}"))
        return 1
    server.close()
    return 0
