"""Commands about adapters: read in a thread while others serve, put in place between two steps."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from . import commands
from .commands import Refused, Updated, UpdateWeights
from .engine import Engine
from .hosted import Hosted, Work, aside
from .request import EngineError


class Adapting:
    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted

    def load(self, command: commands.LoadAdapter) -> Work[commands.Adapters]:
        (engine,), name = self._hosted.named(command.model), command.name
        self._check_name(engine, name)
        _insist(engine.adapters.refusal(name, command.replace))
        adapter = yield from aside(partial(engine.adapters.read, command.path), "lora_path")
        self._check_name(engine, name)
        self._hosted.said += engine.settle()
        _insist(engine.adapters.load(name, adapter, command.replace))
        return _shown(engine)

    def unload(self, command: commands.UnloadAdapter) -> commands.Adapters:
        (engine,) = self._hosted.named(command.model)
        _insist(engine.adapters.unload(command.name))
        return _shown(engine)

    def update(self, command: UpdateWeights) -> Work[tuple[Updated, str]]:
        """The adapter becomes the model's own. Gives the digest of its files, too."""
        (engine,) = self._hosted.named(command.model)
        if command.also:
            what = f"an adapter changes model {engine.card.name} alone; leave `also` out"
            raise Refused(EngineError("invalid", what, "also"))
        _insist(engine.adapters.refusal("", replace=True))
        began = time.perf_counter()
        adapter = yield from aside(partial(engine.adapters.read, command.path), "path")
        staged = time.perf_counter() - began
        yield from self._hosted.drained([engine], command.in_flight)
        began = time.perf_counter()
        self._hosted.still([engine], command.in_flight)
        _insist(engine.adapters.adopt(adapter))
        pages = engine.renew(command.label)
        committed = time.perf_counter() - began
        engine.scheduler.counts.weight_update_seconds.observe(staged + committed)
        engine.scheduler.counts.weight_commit_seconds.observe(committed)
        return Updated(
            models=(engine.card.name,),
            committed=True,
            version=engine.card.weight_version,
            label=engine.card.weight_label,
            tensors=adapter.tensors,
            bytes=adapter.bytes,
            stage_seconds=staged,
            commit_seconds=committed,
            kv_invalidated=pages,
        ), adapter.digest

    def _check_name(self, engine: Engine, name: str) -> None:
        """Requests find an adapter by its name alone: nothing else may have it."""
        if not name:
            raise Refused(EngineError("invalid", "an adapter needs a name", "lora_name"))
        for other in self._hosted.engines:
            adapters = [] if other is engine else [adapter.name for adapter in other.card.adapters]
            if name in (other.card.name, *other.card.aliases, *adapters):
                message = f"{name!r} is the name of something else here; give the adapter another one"
                raise Refused(EngineError("invalid", message, "lora_name"))


def _shown(engine: Engine) -> commands.Adapters:
    """The card says which adapters there are."""
    engine.card = replace(engine.card, adapters=engine.adapters.cards)
    return commands.Adapters(tuple(card.name for card in engine.adapters.cards))


def _insist(error: EngineError | None) -> None:
    if error is not None:
        raise Refused(error)
