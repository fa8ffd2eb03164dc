"""Commands, carried out between the steps of a hub's engines.

A command is a generator: it runs until it has to wait (for requests to finish, for another thread) and is moved on
once between two steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from . import commands
from .commands import AnyCommand, Refused
from .engine import Engine
from .request import EngineError, Output

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Work = Generator[None, None, Result]


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
    """`said`: what requests are told because of commands, until somebody takes it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._tasks: list[Task] = []
        self.said: list[Output] = []

    def begin(self, command: AnyCommand) -> Task:
        task = Task(self._work(command))
        self._tasks.append(task)
        return task

    def turn(self) -> None:
        """Moves every command on, in the order in which they came."""
        for task in self._tasks:
            task.move()
        self._tasks = [task for task in self._tasks if not task.done]

    def take(self) -> list[Output]:
        said, self.said = self.said, []
        return said

    def _work(self, command: AnyCommand) -> Work[object]:
        match command:
            case commands.Pause():
                return (yield from self._pause(command))
            case commands.Resume():
                return self._resume(command)
            case commands.AbortAll():
                return commands.Aborted(self._abort(self._named(command.model)))
            case commands.ResetPrefixCache():
                return self._reset(command)
            case commands.Normalize():
                return self._normalize(command)
            case commands.Relabel():
                return self._relabel(command)
            case _:
                what = f"{type(command).__name__} cannot be carried out by this engine"
                raise Refused(EngineError("invalid", what))

    # Pausing ----------------------------------------------------------------------------------------------------------

    def _pause(self, command: commands.Pause) -> Work[commands.Paused]:
        engines, aborted = self._named(command.model), 0
        if command.mode == "wait":
            yield from self._finished(engines)
        for engine in engines:
            if command.mode != "keep":
                engine.refused = _closed(engine, "is paused")
            if command.mode == "abort":
                aborted += self._abort([engine])
            self.said += engine.pause()
            if command.clear_cache:
                engine.scheduler.pages.drop()
        names = tuple(engine.card.name for engine in engines)
        return commands.Paused(names, aborted, sum(engine.requests for engine in engines))

    def _finished(self, engines: Iterable[Engine]) -> Work[None]:
        """Waits until these have no request left, and lets none in meanwhile. Raises Refused where that will not be."""
        frozen = next((engine for engine in engines if engine.card.paused and engine.requests), None)
        if frozen is not None:
            message = f"model {frozen.card.name} is paused with {frozen.requests} requests, which do not finish"
            raise Refused(EngineError("conflict", f"{message}; resume it first, or abort them", "mode"))
        told = [(engine, _closed(engine, "finishes what it has and then pauses")) for engine in engines]
        for engine, error in told:
            engine.refused = error
        while any(engine.requests for engine, _ in told):
            yield
            for engine, error in told:
                if engine.refused is not error:
                    what = f"model {engine.card.name} was resumed or paused before its requests had finished"
                    raise Refused(EngineError("conflict", what))

    def _resume(self, command: commands.Resume) -> commands.Resumed:
        engines = self._named(command.model)
        for engine in engines:
            engine.resume()
        return commands.Resumed(tuple(engine.card.name for engine in engines))

    def _abort(self, engines: Iterable[Engine]) -> int:
        """How many requests that were."""
        count = 0
        for engine in engines:
            count += engine.requests
            why = f"the requests of model {engine.card.name} were aborted by a command"
            self.said += engine.abort_all(EngineError("unavailable", why))
        return count

    # What a model keeps -----------------------------------------------------------------------------------------------

    def _reset(self, command: commands.ResetPrefixCache) -> commands.CacheReset:
        engines = self._named(command.model)
        pages = sum(engine.scheduler.pages.drop() for engine in engines)
        return commands.CacheReset(pages, sum(engine.requests for engine in engines))

    def _normalize(self, command: commands.Normalize) -> commands.Normalized:
        (engine,) = self._named(command.model)
        mean, std = command.mean, command.std
        if engine.card.gives not in ("scores", "values"):
            what = f"model {engine.card.name} gives {engine.card.gives}: there is no reward to normalise"
            raise Refused(EngineError("invalid", what, "model"))
        if not math.isfinite(mean):
            raise Refused(EngineError("invalid", f"mean is {mean}; it must be finite", "mean"))
        if not (math.isfinite(std) and std > 0):
            raise Refused(EngineError("invalid", f"std is {std}; it must be finite and above 0", "std"))
        engine.card = replace(engine.card, reward_mean=mean, reward_std=std)
        return commands.Normalized(mean, std)

    def _relabel(self, command: commands.Relabel) -> commands.Relabelled:
        (engine,) = self._named(command.model)
        engine.card = replace(engine.card, weight_label=command.label)
        return commands.Relabelled(engine.card.weight_version, command.label)

    def _named(self, name: str | None) -> list[Engine]:
        """The engine of a model, by its name or an alias; None: all."""
        found = [e for e in self._engines if name is None or name == e.card.name or name in e.card.aliases]
        if not found:
            known = ", ".join(engine.card.name for engine in self._engines)
            raise Refused(EngineError("not_found", f"no model {name!r} is hosted here; there are {known}", "model"))
        return found


def _closed(engine: Engine, why: str) -> EngineError:
    return EngineError("unavailable", f"model {engine.card.name} {why}; it takes requests again after resume")
