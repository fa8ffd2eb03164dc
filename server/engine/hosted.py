"""The engines of a hub as commands see them: found by name, emptied of requests."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from ...model.errors import CheckpointError
from .background import in_background
from .commands import InFlight, Refused
from .engine import Engine
from .request import EngineError, Output
from .transfer import TransferFailed

Result = TypeVar("Result")
Work = Generator[None, None, Result]  # a command: moved on once between two steps, until it has its result


class Hosted:
    """`said`: what requests are told because of commands, until somebody takes it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.said: list[Output] = []

    def named(self, name: str | None) -> list[Engine]:
        """The engine of a model, by its name or an alias; None: all. Raises Refused."""
        found = [e for e in self.engines if name is None or name == e.card.name or name in e.card.aliases]
        if not found:
            known = ", ".join(engine.card.name for engine in self.engines)
            raise Refused(EngineError("not_found", f"no model {name!r} is hosted here; there are {known}", "model"))
        return found

    def finished(self, engines: Sequence[Engine], until: str) -> Work[None]:
        """Waits until these have no request left. New ones are refused meanwhile, and afterwards, too; `until` says to
        them when not any more. Raises Refused where requests will not finish."""
        frozen = next((engine for engine in engines if engine.card.paused and engine.requests), None)
        if frozen is not None:
            message = f"model {frozen.card.name} is paused with {frozen.requests} requests, which do not finish"
            raise Refused(EngineError("conflict", f"{message}; resume it first, or abort them"))
        told = [(engine, closed(engine, "finishes what it has", until)) for engine in engines]
        for engine, error in told:
            engine.refused = error
        while any(engine.requests for engine in engines):
            yield
            for engine, error in told:
                if engine.refused is not error:
                    what = f"model {engine.card.name} was resumed or paused before its requests had finished"
                    raise Refused(EngineError("conflict", what))

    def drained(self, engines: Sequence[Engine], in_flight: InFlight) -> Work[None]:
        """With `wait`, until these have no request left; none is let in meanwhile. Raises Refused."""
        if in_flight != "wait":
            return
        refused = [engine.refused for engine in engines]
        try:
            yield from self.finished(engines, "once its weights are replaced")
        finally:
            for engine, error in zip(engines, refused, strict=True):
                engine.refused = error

    def still(self, engines: Sequence[Engine], in_flight: InFlight) -> None:
        """With `abort` no request of theirs is left, and in any case no step is on its way."""
        if in_flight == "abort":
            self.abort(engines)
        for engine in engines:
            self.said += engine.settle()

    def abort(self, engines: Iterable[Engine]) -> int:
        """Ends their requests; how many that were."""
        count = 0
        for engine in engines:
            count += engine.requests
            why = f"the requests of model {engine.card.name} were aborted by a command"
            self.said += engine.abort_all(EngineError("unavailable", why))
        return count


def aside(work: Callable[[], Result], param: str | None = None) -> Work[Result]:
    """The result of what another thread does. Raises Refused where what was given, as `param`, is to blame."""
    future = in_background(work)
    while not future.done():
        yield
    try:
        return future.result()
    except (CheckpointError, OSError) as error:
        raise Refused(EngineError("invalid", str(error), param)) from error
    except TransferFailed as error:
        raise Refused(EngineError("deadline", str(error), param)) from error


def closed(engine: Engine, why: str, until: str) -> EngineError:
    return EngineError("unavailable", f"model {engine.card.name} {why}; it takes requests again {until}")
