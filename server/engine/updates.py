"""Commands that replace weights: staged in a thread while the old ones serve, committed between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch

from ...model.errors import CheckpointError
from ...model.incoming import digest_of, from_disk, from_shared_memory
from ...model.model import Model
from ...model.stored import Stored
from ...model.update import Update
from . import commands
from .adapting import Adapting
from .commands import FinishUpdate, Refused, Source, Updated, UpdateWeights
from .control import ADAPTED, Change
from .engine import Engine
from .hosted import Hosted, Work, aside
from .ipc import from_cuda_ipc
from .request import EngineError
from .transfer import Transfer, check

CAME: Mapping[Source, str] = MappingProxyType(
    {
        "disk": "disk",
        "lora": ADAPTED,
        "shm": "shared memory",
        "cuda_ipc": "CUDA IPC",
        "distributed": "broadcast",
    }
)

Rounds = Iterator[list[tuple[str, Stored]]]


@dataclass(eq=False, slots=True)
class Staging:
    """An update on its way. `started`: open for more until it is finished; `busy`: a command works on it."""

    started: bool
    busy: bool = False
    update: Update | None = None
    seconds: float = 0.0
    label: str = ""
    came: list[str] = field(default_factory=list[str])
    files: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (path, digest)


class Updates:
    """`changes`: see `control.Standing`."""

    def __init__(self, hosted: Hosted, adapting: Adapting) -> None:
        self._hosted, self._adapting = hosted, adapting
        self._stagings: dict[str, Staging] = {}  # by model
        self._transfers: dict[str, Transfer] = {}  # by group
        self.changes: tuple[Change, ...] = ()

    def start(self, command: commands.StartUpdate) -> commands.UpdateStarted:
        name = self._one(command.model).card.name
        if name in self._stagings:
            self._idle(name)
        self._stagings[name] = Staging(started=True)
        return commands.UpdateStarted(name)

    def update(self, command: UpdateWeights) -> Work[Updated]:
        engine = self._one(command.model)
        name, model = engine.card.name, _model(engine)
        if command.alone and name in self._stagings and self._idle(name):
            del self._stagings[name]
        staging = self._idle(name) if name in self._stagings else Staging(started=False)
        if command.source == "lora":
            if staging.started:
                what = f"an update of model {name} is started; finish it before the model gets an adapter"
                raise Refused(EngineError("conflict", what, "source"))
            return (yield from self._adapt(command))
        rounds = self._rounds(command, model)
        self._stagings[name] = staging
        staging.busy, kept = True, False
        try:
            complete = not (staging.started or command.partial)
            yield from aside(partial(_stage, staging, model, command, rounds, complete))
            kept = staging.started
            if not kept:
                return (yield from self._commit(engine, staging, command))
        finally:
            staging.busy = False
            if not kept:  # done, or spoilt by what was given
                del self._stagings[name]
        staging.label = command.label or staging.label
        return self._told([engine], staging, committed=False)

    def finish(self, command: FinishUpdate) -> Work[Updated]:
        engine = self._one(command.model)
        name = engine.card.name
        if name not in self._stagings or self._idle(name).update is None:
            what = f"nothing is staged for model {name}: start an update and send weights first"
            raise Refused(EngineError("conflict", what))
        staging = self._idle(name)
        staging.busy = True
        try:
            return (yield from self._commit(engine, staging, command))
        finally:
            del self._stagings[name]

    def label(self, command: commands.LabelWeights) -> commands.Labelled:
        engine = self._one(command.model)
        engine.label(command.label)
        return commands.Labelled(engine.card.weight_version, command.label)

    # Transfer groups --------------------------------------------------------------------------------------------------

    def join(self, command: commands.InitTransfer) -> Work[commands.TransferReady]:
        if not 1 <= command.rank_offset < command.world_size:
            what = f"rank_offset is {command.rank_offset}: it must be 1 to world_size - 1, {command.world_size - 1}"
            raise Refused(EngineError("invalid", f"{what}; rank 0 is the trainer", "rank_offset"))
        devices = [_model(engine).place.device for engine in self._hosted.engines if isinstance(engine.model, Model)]
        device = devices[0] if devices else torch.device("cpu")
        if command.backend == "nccl" and device.type != "cuda":
            what = f"backend is nccl, but the models lie on {device.type}; use gloo"
            raise Refused(EngineError("invalid", what, "backend"))
        self._transfers.pop(command.group, None)
        self._transfers[command.group] = yield from aside(partial(Transfer, command, device))
        return commands.TransferReady(command.rank_offset, command.world_size)

    def leave(self, command: commands.DestroyTransfer) -> commands.TransferClosed:
        """One that was never joined is left, too."""
        self._transfers.pop(command.group, None)
        return commands.TransferClosed(command.group)

    def _adapt(self, command: UpdateWeights) -> Work[Updated]:
        updated, digest = yield from self._adapting.update(command)
        before = [
            change for change in self.changes if not (change.models == updated.models and change.came == CAME["lora"])
        ]
        self.changes = (*before, Change(updated.models, True, ((command.path, digest),), CAME["lora"]))
        return updated

    # Inside -----------------------------------------------------------------------------------------------------------

    def _one(self, name: str) -> Engine:
        (engine,) = self._hosted.named(name)
        return engine

    def _idle(self, name: str) -> Staging:
        staging = self._stagings[name]
        if staging.busy:
            raise Refused(EngineError("conflict", f"another command is staging or committing weights of model {name}"))
        return staging

    def _rounds(self, command: UpdateWeights, model: Model) -> Callable[[], Rounds]:
        """What gives the tensors, in another thread. Raises Refused where that is known already to fail."""
        match command.source:
            case "lora":
                raise AssertionError("an adapter is no tensors of the model")
            case "disk":
                return lambda: iter([from_disk(command.path, model.config.labels > 0).tensors])
            case "shm":
                return lambda: iter([from_shared_memory(command.path, command.size).tensors])
            case "cuda_ipc":
                return lambda: iter([from_cuda_ipc(command.handles)])
            case "distributed":
                transfer = self._transfers.get(command.group)
                if transfer is None or transfer.failed:
                    what = f"there is no transfer group {command.group!r}: init it first"
                    raise Refused(EngineError("conflict", what, "group"))
                try:
                    check(command.tensors)
                except CheckpointError as error:
                    raise Refused(EngineError("invalid", str(error), "tensors")) from error
                packed = transfer.command.packed if command.packed is None else command.packed
                return partial(transfer.receive, command.tensors, packed, command.chunk_bytes)

    def _commit(self, engine: Engine, staging: Staging, command: UpdateWeights | FinishUpdate) -> Work[Updated]:
        update = staging.update
        assert update is not None
        yield from aside(partial(_complete, staging, update, command.partial))
        engines = [engine, *self._sharing(engine, update, command.also)]
        yield from self._hosted.drained(engines, command.in_flight)
        began = time.perf_counter()
        self._hosted.still(engines, command.in_flight)
        update.commit()
        for each in engines:
            each.adapters.disown()
        staging.label = command.label or staging.label
        pages = sum(each.renew(staging.label) for each in engines)
        seconds = time.perf_counter() - began
        for each in engines:
            each.scheduler.counts.weight_update_seconds.observe(staging.seconds + seconds)
            each.scheduler.counts.weight_commit_seconds.observe(seconds)
        self._note(engines, staging, command.partial)
        return self._told(engines, staging, committed=True, commit_seconds=seconds, kv_invalidated=pages)

    def _sharing(self, engine: Engine, update: Update, also: Sequence[str]) -> list[Engine]:
        """The other engines whose model the update changes. Raises Refused unless `also` names just these."""
        others = [each for each in self._hosted.engines if each is not engine and isinstance(each.model, Model)]
        sharing = [each for each in others if update.touches(_model(each))]
        listed = [self._one(name) for name in also]
        if left_out := [each.card.name for each in sharing if each not in listed]:
            what = f"the weights of model {engine.card.name} are shared with {', '.join(left_out)}"
            how = "name all of them in `also`, and all get them; what must stay needs a checkpoint of its own"
            raise Refused(EngineError("conflict", f"{what}: {how}", "also"))
        if alone := [each.card.name for each in listed if each not in sharing]:
            what = f"model {alone[0]} shares none of these weights with {engine.card.name}"
            raise Refused(EngineError("invalid", what, "also"))
        return sharing

    def _note(self, engines: Sequence[Engine], staging: Staging, part: bool) -> None:
        models = tuple(engine.card.name for engine in engines)
        came = next((how for how in staging.came if how != CAME["disk"]), CAME["disk"])
        files = tuple(staging.files) if came == CAME["disk"] else ()
        before = [change for change in self.changes if part or not set(change.models) <= set(models)]
        self.changes = (*before, Change(models, part, files, came))

    def _told(self, engines: Sequence[Engine], staging: Staging, committed: bool, **more: float) -> Updated:
        update, card = staging.update, engines[0].card
        assert update is not None
        return Updated(
            models=tuple(engine.card.name for engine in engines),
            committed=committed,
            version=card.weight_version,
            label=card.weight_label,
            tensors=update.tensors,
            bytes=update.bytes,
            stage_seconds=staging.seconds,
            commit_seconds=more.get("commit_seconds", 0.0),
            kv_invalidated=int(more.get("kv_invalidated", 0)),
        )


def _model(engine: Engine) -> Model:
    if not isinstance(engine.model, Model):
        what = f"model {engine.card.name} has no weights that could be replaced"
        raise Refused(EngineError("invalid", what, "model"))
    return engine.model


def _stage(
    staging: Staging, model: Model, command: UpdateWeights, rounds: Callable[[], Rounds], complete: bool
) -> None:
    """In another thread. What is broadcast is taken to its end, whatever is wrong with it: the trainer sends it all."""
    began, wrong = time.perf_counter(), None
    if staging.update is None:
        staging.update = Update(model)
    digest = digest_of(command.path) if command.source == "disk" else ""
    for tensors in rounds():
        if wrong is None:
            try:
                staging.update.stage(tensors, complete and command.source != "distributed")
            except CheckpointError as error:
                wrong = error
    if wrong is not None:
        raise wrong
    if digest and digest != digest_of(command.path):
        raise CheckpointError(f"{command.path} changed while it was read")
    staging.came.append(CAME[command.source])
    if digest:
        staging.files.append((command.path, digest))
    staging.seconds += time.perf_counter() - began


def _complete(staging: Staging, update: Update, part: bool) -> None:
    began = time.perf_counter()
    update.complete(part)
    staging.seconds += time.perf_counter() - began
