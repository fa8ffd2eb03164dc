"""Commands, carried out between the steps of a hub's engines.

A command is a generator: it runs until it has to wait (for requests to finish, for another thread) and is moved on
once between two steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import commands
from .adapting import Adapting
from .commands import AnyCommand, Refused
from .control import ModelState, Standing
from .engine import Engine
from .hosted import Hosted, Work, closed
from .request import EngineError, Output
from .updates import Updates

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Task:
    """A command that was begun. `outcome`: its reply, or why it was refused; None until it is `done`."""

    work: Work[object]
    outcome: object = None

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def result(self) -> object:
        """The reply. Raises Refused."""
        if isinstance(self.outcome, EngineError):
            raise Refused(self.outcome)
        return self.outcome

    def move(self) -> None:
        try:
            next(self.work)
        except StopIteration as end:
            self.outcome = end.value
        except Refused as refused:
            self.outcome = refused.error
        except Exception as error:  # a bug; the engine goes on serving
            log.exception("a command failed")
            what = f"the command failed ({type(error).__name__}); the log has the traceback"
            self.outcome = EngineError("internal", what)


class Administration:
    def __init__(self, engines: Sequence[Engine]) -> None:
        self._hosted = Hosted(engines)
        self._adapting = Adapting(self._hosted)
        self.updates = Updates(self._hosted, self._adapting)
        self._tasks: list[Task] = []

    @property
    def standing(self) -> Standing:
        return Standing(tuple(map(_state_of, self._hosted.engines)), self.updates.changes)

    def begin(self, command: AnyCommand) -> Task:
        task = Task(self._work(command))
        self._tasks.append(task)
        return task

    def turn(self) -> None:
        """Moves every command on, in the order in which they came."""
        for task in self._tasks:
            task.move()
        self._tasks = [task for task in self._tasks if not task.done]

    @property
    def has_said(self) -> bool:
        return bool(self._hosted.said)

    def take(self) -> list[Output]:
        """What requests are told because of commands."""
        said, self._hosted.said = self._hosted.said, []
        return said

    def give_back(self, outputs: list[Output]) -> None:
        """They are taken first the next time."""
        self._hosted.said[:0] = outputs

    def _work(self, command: AnyCommand) -> Work[object]:
        match command:
            case commands.Pause():
                return (yield from self._pause(command))
            case commands.Resume():
                return self._resume(command)
            case commands.AbortAll():
                return commands.Aborted(self._hosted.abort(self._hosted.named(command.model)))
            case commands.ResetPrefixCache():
                return self._reset(command)
            case commands.Normalize():
                return self._normalize(command)
            case commands.StartUpdate():
                return self.updates.start(command)
            case commands.UpdateWeights():
                return (yield from self.updates.update(command))
            case commands.FinishUpdate():
                return (yield from self.updates.finish(command))
            case commands.LabelWeights():
                return self.updates.label(command)
            case commands.InitTransfer():
                return (yield from self.updates.join(command))
            case commands.DestroyTransfer():
                return self.updates.leave(command)
            case commands.LoadAdapter():
                return (yield from self._adapting.load(command))
            case commands.UnloadAdapter():
                return self._adapting.unload(command)

    def _pause(self, command: commands.Pause) -> Work[commands.Paused]:
        engines, aborted = self._hosted.named(command.model), 0
        if command.mode == "wait":
            yield from self._hosted.finished(engines, "after it was paused and resumed")
        for engine in engines:
            if command.mode != "keep":
                engine.refused = closed(engine, "is paused", "after resume")
            if command.mode == "abort":
                aborted += self._hosted.abort([engine])
            self._hosted.said += engine.pause()
            if command.clear_cache:
                engine.scheduler.pages.drop()
        names = tuple(engine.card.name for engine in engines)
        return commands.Paused(names, aborted, sum(engine.requests for engine in engines))

    def _resume(self, command: commands.Resume) -> commands.Resumed:
        engines = self._hosted.named(command.model)
        for engine in engines:
            engine.resume()
        return commands.Resumed(tuple(engine.card.name for engine in engines))

    def _reset(self, command: commands.ResetPrefixCache) -> commands.CacheReset:
        engines = self._hosted.named(command.model)
        pages = sum(engine.scheduler.pages.drop() for engine in engines)
        return commands.CacheReset(pages, sum(engine.requests for engine in engines))

    def _normalize(self, command: commands.Normalize) -> commands.Normalized:
        (engine,) = self._hosted.named(command.model)
        mean, std = command.mean, command.std
        if engine.card.gives not in ("scores", "values"):
            what = f"model {engine.card.name} gives {engine.card.gives}: there is no reward to normalise"
            raise Refused(EngineError("invalid", what, "model"))
        if not math.isfinite(mean):
            raise Refused(EngineError("invalid", f"mean is {mean}; it must be finite", "mean"))
        if not (math.isfinite(std) and std > 0):
            raise Refused(EngineError("invalid", f"std is {std}; it must be finite and above 0", "std"))
        kind = command.normalization
        engine.card = replace(engine.card, reward_mean=mean, reward_std=std, reward_normalization=kind)
        return commands.Normalized(mean, std)


def _state_of(engine: Engine) -> ModelState:
    card = engine.card
    return ModelState(
        name=card.name,
        digest=engine.digest,
        version=card.weight_version,
        label=card.weight_label,
        reward_mean=card.reward_mean,
        reward_std=card.reward_std,
        reward_normalization=card.reward_normalization,
        paused=card.paused,
        adapters=engine.adapters.sources,
    )
