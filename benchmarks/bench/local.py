"""Tandem's engine in this process: the one that serves, without HTTP. It is given requests and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ...server.engine.engine import Engine
from ...server.engine.hub import Hub
from ...server.engine.options import EngineOptions, ModelSpec
from ...server.engine.request import Output, Request, Sampling
from .models import UsageError

Follow = Callable[[Request, "Answer"], Iterable[Request]]  # what is asked next, once a request is answered
Tick = Callable[[int], None]  # told how many requests are answered


@dataclass(slots=True)
class Answer:
    """Seconds count from when the run began."""

    asked: float
    first: float | None = None  # first token, or the score
    end: float = 0.0
    token_ids: dict[int, list[int]] = field(default_factory=dict[int, list[int]])  # by choice
    scores: list[float] | None = None
    cached: int = 0  # tokens of the prompt that were found in the prefix cache

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))


@dataclass(frozen=True)
class Counted:
    """What one model did in one run."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int  # prompts' and answers'
    generated_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float  # of this process, all threads
    steps: int
    answers: dict[int, Answer]  # by request
    counted: dict[str, Counted]  # by model


class Local:
    """Models in one engine process, this one. Raises OptionsError and CheckpointError."""

    def __init__(self, specs: Sequence[ModelSpec], options: EngineOptions) -> None:
        self.hub = Hub.load(specs, options)
        while self.hub.idle():  # what a server would prepare while nobody asks
            pass

    def engine(self, name: str) -> Engine:
        found = self.hub.engine(name)
        assert found is not None, name
        return found

    def forget(self) -> None:
        """Empties the prefix caches, so that a run cannot read what the one before computed."""
        for engine in self.hub.engines:
            engine.scheduler.pages.drop()

    def run(self, requests: Iterable[Request], follow: Follow | None = None, tick: Tick | None = None) -> Run:
        """Hands all requests over, then those that `follow` asks for behind each answer, until nothing is left.

        Raises UsageError for the first request that is refused or fails: figures without it would mean nothing.
        """
        hub = self.hub
        before = {engine.card.name: self._counts(engine) for engine in hub.engines}
        asked: dict[int, Request] = {}
        left: dict[int, int] = {}  # choices that are not finished
        answers: dict[int, Answer] = {}
        done = steps = 0
        cpu, began = time.process_time(), time.perf_counter()

        def submit(one: Request) -> None:
            asked[one.id], left[one.id] = one, one.n
            answers[one.id] = Answer(time.perf_counter() - began)
            for output in hub.submit(one):
                self._fail(output, answers)

        for request in requests:
            submit(request)
        while hub.has_work:
            outputs = hub.step()
            steps += 1
            now = time.perf_counter() - began
            for output in outputs:
                answer = answers[output.request_id]
                if output.error is not None:
                    self._fail(output, answers)
                if answer.first is None:
                    answer.first = now
                if output.token_ids:
                    answer.token_ids.setdefault(output.choice, []).extend(output.token_ids)
                if output.cached_tokens is not None:
                    answer.cached = output.cached_tokens
                if output.scores is not None:
                    answer.scores = output.scores
                if output.finish is None:
                    continue
                answer.end = now
                left[output.request_id] -= 1
                if left[output.request_id]:
                    continue
                done += 1
                if tick is not None:
                    tick(done)
                for one in follow(asked[output.request_id], answer) if follow is not None else ():
                    submit(one)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        counted: dict[str, Counted] = {}
        for engine in hub.engines:
            pairs = zip(before[engine.card.name], self._counts(engine), strict=True)
            counted[engine.card.name] = Counted(*(after - earlier for earlier, after in pairs))
        return Run(seconds, cpu, steps, answers, counted)

    @staticmethod
    def _counts(engine: Engine) -> tuple[int, ...]:
        found = engine.scheduler.counts
        asked = found.started, found.prompt_tokens, found.cached_tokens
        return *asked, found.computed_tokens, found.generated_tokens, found.preemptions

    def _fail(self, output: Output, answers: dict[int, Answer]) -> None:
        assert output.error is not None
        for number in answers:
            self.hub.abort(number)
        raise UsageError(output.error.message)


def generate(number: int, model: str, token_ids: list[int], output_len: int, *, n: int = 1, seed: int = 0) -> Request:
    """Exactly `output_len` tokens, greedy."""
    sampling = Sampling(output_len, seed, temperature=0.0, ignore_eos=True)
    return Request(number, model, token_ids, sampling, n=n)


def score(number: int, model: str, token_ids: list[int], salt: str = "") -> Request:
    """Requests of one `salt` alone share what they have in common."""
    return Request(number, model, token_ids, want=frozenset({"score"}), cache_salt=salt)
