"""Several models in one process: who gets the device next, and for how long.

The device goes to the busy model that had the least device time per weight; a model that was idle starts where the
others are, so idling earns nothing. While another model's sequences wait for their next token, a step may take most of
the time of one step of theirs: prompts are then computed in smaller chunks, sized by what steps were seen to take. Two
such steps in a row would be felt more than a rest of device time is worth: see `_Place.yields_to`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from .administration import Administration, Task
from .commands import AnyCommand, Command
from .control import Change, Standing
from .counts import ModelStats
from .engine import Engine
from .guides import LoadGrammars
from .hosting import Progress, load_engines
from .options import EngineOptions, ModelSpec
from .request import Catalog, EngineError, Finish, Group, Output, Outputs, Request

Asked = TypeVar("Asked", Request, Group)

Reply = TypeVar("Reply")

WAIT_SECONDS = 0.001  # between two looks at a command that waits, where nothing else is to do
BESIDE = 0.8  # of a decode step: what a prompt's step beside it may take, so that gaps between tokens at most double
NEWEST = 0.2  # weight of the newest step in a running mean


class StepCost:
    """Seconds of a step by its tokens: the line through the mean decode step and the mean step with prompts in it."""

    def __init__(self) -> None:
        self._means: dict[bool, tuple[float, float]] = {}  # pure decode? -> tokens, seconds

    def observe(self, tokens: int, decodes_only: bool, seconds: float) -> None:
        mean = self._means.get(decodes_only, (float(tokens), seconds))
        self._means[decodes_only] = (
            mean[0] + NEWEST * (tokens - mean[0]),
            mean[1] + NEWEST * (seconds - mean[1]),
        )

    @property
    def decode_seconds(self) -> float | None:
        return self._means[True][1] if True in self._means else None

    def tokens_within(self, seconds: float) -> int | None:
        """How many tokens a step of that time has; None before any step was seen."""
        if not self._means:
            return None
        few, many = self._means.get(True), self._means.get(False)
        if few and many and many[0] > few[0] and many[1] > few[1]:
            per_token = (many[1] - few[1]) / (many[0] - few[0])
            return int((seconds - few[1]) / per_token + few[0])
        tokens, taken = many or few or (0.0, 1.0)
        return int(seconds * tokens / max(taken, 1e-9))


class _Place:
    """An engine's account of device time."""

    def __init__(self, engine: Engine, weight: float) -> None:
        self.engine, self.weight = engine, weight
        self.time = 0.0  # device seconds / weight
        self.busy = False
        self.cost = StepCost()
        self.newest = 0.0  # device seconds / weight of the last step

    def yields_to(self, other: _Place) -> bool:
        """Whether decodes of the other go first although this one, which has just computed a prompt's chunk, has had a
        little less time: what it lacks is less than half of such a chunk, and is forgotten."""
        return other.time - self.time < self.newest / 2


class Hub:
    """Everything is called from one thread. `division` says in one sentence how the memory was divided."""

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        weights: Sequence[float] | None = None,
        epoch: int = 0,
        step_target: float | None = None,
        division: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engines = list(engines)
        self.division = division
        self.catalog = Catalog(epoch, 1, tuple(engine.card for engine in engines))
        self._step_target = step_target  # seconds
        self._clock = clock
        self._administration = Administration(self.engines)
        self._last: _Place | None = None  # whose step was the last
        self._places = [_Place(e, w) for e, w in zip(engines, weights or [1.0] * len(engines), strict=True)]

    @staticmethod
    def load(
        specs: Sequence[ModelSpec],
        options: EngineOptions,
        *,
        epoch: int = 0,
        on_progress: Progress | None = None,
        grammars: LoadGrammars | None = None,
    ) -> Hub:
        """Reads the checkpoints and takes the memory. Raises CheckpointError and OptionsError, naming the model."""
        engines, division = load_engines(specs, options, on_progress, grammars)
        target = None if options.step_target_ms is None else options.step_target_ms / 1000
        weights = [spec.weight for spec in specs]
        return Hub(engines, weights=weights, epoch=epoch, step_target=target, division=division)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute, or something to say."""
        return self._administration.has_said or any(engine.has_work for engine in self.engines)

    def engine(self, name: str) -> Engine | None:
        """The engine of a model, by its name or an alias."""
        return next((e for e in self.engines if name == e.card.name or name in e.card.aliases), None)

    def submit(self, request: Request) -> list[Output]:
        """Hands a request to its model. What is refused comes back at once, as an output with an error."""
        engine, request = self._addressee(request)
        if engine is None:
            known = ", ".join(card.name for card in self.catalog.listed)
            error = EngineError("not_found", f"no model {request.model!r} is hosted here; there are {known}", "model")
        else:
            error = engine.add(request)
        return [Output(request.id, finish="error", error=error)] if error else []

    def open(self, group: Group) -> None:
        """Begins a group. Why one cannot be is told to its members."""
        engine, group = self._addressee(group)
        if engine is not None:  # else members are refused for that
            engine.open(group)

    def close(self, group_id: int) -> list[Output]:
        """Ends a group, and what its members have not finished."""
        return [output for engine in self.engines for output in engine.close(group_id)]

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> list[Output]:
        return [output for engine in self.engines for output in engine.abort(request_id, choice, finish)]

    def order(self, command: AnyCommand) -> Task:
        """Begins a command; `turn` carries it on."""
        return self._administration.begin(command)

    def turn(self) -> None:
        """Between two steps: moves the commands that are not done, and brings the catalog up to date."""
        self._administration.turn()
        cards = tuple(engine.card for engine in self.engines)
        if cards != self.catalog.models:
            self.catalog = replace(self.catalog, version=self.catalog.version + 1, models=cards)

    @property
    def standing(self) -> Standing:
        """What another hub must come to in order to serve in this one's place."""
        return self._administration.standing

    def resume_from(self, changes: tuple[Change, ...]) -> None:
        """These weights were committed before, and have been put in place again."""
        self._administration.updates.changes = changes
        self.turn()

    def execute(self, command: Command[Reply]) -> Reply:
        """Carries a command out in this thread, with the steps that it waits for; the next `step` tells what they gave.
        Raises Refused."""
        task, outputs = self.order(cast(AnyCommand, command)), list[Output]()
        self.turn()
        while not task.done:
            outputs += self.step()
            if not self.has_work:
                time.sleep(WAIT_SECONDS)
            self.turn()
        self._administration.give_back(outputs)
        return cast(Reply, task.result())

    def stats(self) -> list[ModelStats]:
        return [engine.stats for engine in self.engines]

    def expire(self, now: float) -> list[Output]:
        """Ends requests whose deadline (time.monotonic) is over."""
        return [output for engine in self.engines for output in engine.expire(now)]

    def step(self) -> Outputs:
        """One step of the model whose turn it is, and what commands had to say."""
        said, place = self._administration.take(), self._next()
        if place is None:
            return Outputs(said)
        budget = self._budget(place)
        began = self._clock()
        outputs = place.engine.step(budget)
        if said:
            outputs.others[:0] = said
        step = place.engine.last_step
        seconds = self._clock() - began if step.seconds is None else step.seconds
        place.newest, self._last = seconds / place.weight, place
        place.time += place.newest
        if step.tokens:
            place.cost.observe(step.tokens, step.decodes_only, seconds)
        return outputs

    def idle(self) -> bool:
        """Uses a moment without work; whether more could be done in another one."""
        return not self.has_work and any([engine.idle() for engine in self.engines])

    def run(self, requests: Iterable[Request]) -> dict[int, list[Output]]:
        """Answers requests in this thread, until nothing is left to do: by request, its outputs in order."""
        answers: dict[int, list[Output]] = {}
        for request in requests:
            answers[request.id] = self.submit(request)
        while self.has_work:
            for output in self.step():
                answers.setdefault(output.request_id, []).append(output)
        return answers

    def _addressee(self, asked: Asked) -> tuple[Engine | None, Asked]:
        """The engine that it is for. Where an adapter's name stands for the model, the two are told apart from now
        on."""
        engine = self.engine(asked.model)
        if engine is None:
            for one in self.engines:
                if any(adapter.name == asked.model for adapter in one.card.adapters):
                    return one, replace(asked, model=one.card.name, adapter=asked.model)
        return engine, asked

    def _next(self) -> _Place | None:
        if len(self._places) == 1:  # nothing to be fair to
            place = self._places[0]
            return place if place.engine.has_work else None
        busy = [place for place in self._places if place.engine.has_work]
        if not busy:
            for place in self._places:
                place.busy = False
            return None
        went_on = [place.time for place in busy if place.busy]
        floor = min(went_on) if went_on else max(place.time for place in self._places)
        for place in self._places:
            if place.engine.has_work and not place.busy:
                place.time = max(place.time, floor)
            place.busy = place.engine.has_work
        able = [place for place in busy if not place.engine.waits]
        first = min(able or busy, key=lambda place: place.time)
        decoding = [place for place in able if place is not first and place.engine.decoding]
        if first is not self._last or first.engine.last_step.decodes_only or not decoding:
            return first
        behind = min(decoding, key=lambda place: place.time)
        if not first.yields_to(behind):
            return first
        first.time = behind.time
        return behind

    def _budget(self, place: _Place) -> int | None:
        """Tokens that the step may have; None: as many as the model's own limit."""
        waiting = [
            other for other in self._places if other is not place and other.engine.has_work and other.engine.decoding
        ]
        if not waiting:
            return None
        seconds = self._step_target
        if seconds is None:
            known = [other.cost.decode_seconds for other in waiting if other.cost.decode_seconds is not None]
            if not known:
                return None
            seconds = BESIDE * min(known)
        tokens = place.cost.tokens_within(seconds)
        least = place.engine.decoding + place.engine.scheduler.pages.page_size
        return max(tokens or 0, least)  # nothing known yet: begin small
