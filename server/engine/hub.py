"""Several models in one process: who gets the device next, and for how long.

The device goes to the busy model that had the least device time per weight; a model that was idle starts where the
others are, so idling earns nothing. While another model's sequences wait for their next token, a step may take about
as long as one step of theirs: prompts are then computed in smaller chunks, sized by what steps were seen to take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ...model.config import read_config
from ...model.errors import CheckpointError
from ...model.kv_cache import KVCache
from ...model.load import load_model
from ...model.model import Model
from .engine import Engine
from .memory import available_memory, kv_cache_bytes, page_count, shares
from .options import EngineOptions, ModelSpec, OptionsError
from .request import Catalog, EngineError, ModelCard, Output, Request, Role

NEWEST = 0.2  # weight of the newest step in a running mean

Progress = Callable[[str, int, int], None]  # model, bytes done, bytes in all


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
        self._places = [_Place(e, w) for e, w in zip(engines, weights or [1.0] * len(engines), strict=True)]

    @staticmethod
    def load(
        specs: Sequence[ModelSpec], options: EngineOptions, *, epoch: int = 0, on_progress: Progress | None = None
    ) -> Hub:
        """Reads the checkpoints and takes the memory. Raises CheckpointError and OptionsError, naming the model."""
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        names = [name for spec in specs for name in (spec.name, *spec.aliases)]
        for name in names:
            if names.count(name) > 1:
                raise OptionsError(f"two hosted models are called {name}: give each its own name")
        parts = shares(specs)
        models = [_load(spec, options, on_progress) for spec in specs]
        available = available_memory()
        memory = kv_cache_bytes(options, available)
        engines: list[Engine] = []
        for spec, model, part in zip(specs, models, parts, strict=True):
            card = _card(spec, model, options)
            page = KVCache.bytes_per_page(model.config, options.page_size, model.dtype)
            pages = page_count(spec.name, int(memory * part), page, options, card.context)
            engines.append(Engine(card, model, pages=pages, options=options))
        taken = sum(engine.kv_bytes for engine in engines)
        division = (
            f"{sum(model.weight_bytes for model in models) / 2**20:,.0f} MiB of weights; KV caches take "
            f"{taken / 2**20:,.0f} of {memory / 2**20:,.0f} MiB allowed, {available / 2**20:,.0f} MiB were free"
        )
        target = None if options.step_target_ms is None else options.step_target_ms / 1000
        weights = [spec.weight for spec in specs]
        return Hub(engines, weights=weights, epoch=epoch, step_target=target, division=division)

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    def engine(self, name: str) -> Engine | None:
        """The engine of a model, by its name or an alias."""
        return next((e for e in self.engines if name == e.card.name or name in e.card.aliases), None)

    def submit(self, request: Request) -> list[Output]:
        """Hands a request to its model. What is refused comes back at once, as an output with an error."""
        engine = self.engine(request.model)
        if engine is None:
            known = ", ".join(card.name for card in self.catalog.models)
            error = EngineError("not_found", f"no model {request.model!r} is hosted here; there are {known}", "model")
        else:
            error = engine.add(request)
        return [Output(request.id, finish="error", error=error)] if error else []

    def abort(self, request_id: int, choice: int | None = None) -> list[Output]:
        return [output for engine in self.engines for output in engine.abort(request_id, choice)]

    def expire(self, now: float) -> list[Output]:
        """Ends requests whose deadline (time.monotonic) is over."""
        return [output for engine in self.engines for output in engine.expire(now)]

    def step(self) -> list[Output]:
        """One step of the model whose turn it is; nothing where none has work."""
        place = self._next()
        if place is None:
            return []
        budget = self._budget(place)
        began = self._clock()
        outputs = place.engine.step(budget)
        seconds = self._clock() - began
        place.time += seconds / place.weight
        tokens, decodes_only = place.engine.last_plan
        if tokens:
            place.cost.observe(tokens, decodes_only, seconds)
        return outputs

    def run(self, requests: Iterable[Request]) -> dict[int, list[Output]]:
        """Answers requests in this thread, until nothing is left to do: by request, its outputs in order."""
        answers: dict[int, list[Output]] = {}
        for request in requests:
            answers[request.id] = self.submit(request)
        while self.has_work:
            for output in self.step():
                answers.setdefault(output.request_id, []).append(output)
        return answers

    def _next(self) -> _Place | None:
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
        return min(busy, key=lambda place: place.time)

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
            seconds = min(known)
        tokens = place.cost.tokens_within(seconds)
        least = place.engine.decoding + place.engine.scheduler.pages.page_size
        return max(tokens or 0, least)  # nothing known yet: begin small


def _load(spec: ModelSpec, options: EngineOptions, on_progress: Progress | None) -> Model:
    def progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(spec.name, done, total)

    try:
        _check_role(spec, read_config(spec.path).labels)
        return load_model(
            spec.path,
            dtype=spec.dtype,
            device=options.device,
            decode_copy=options.cpu_decode_copy,
            on_progress=progress,
        )
    except CheckpointError as error:
        raise CheckpointError(f"model {spec.name}: {error}") from error


def _check_role(spec: ModelSpec, labels: int) -> Role:
    """The role a model was given, or the one its head says."""
    if spec.role in ("value", "embedding"):
        raise OptionsError(f"model {spec.name}: role {spec.role} is not supported; policy, reference and reward are")
    if spec.role is None:
        return "reward" if labels else "policy"
    if (spec.role == "reward") != (labels > 0):
        head = f"a score head with {labels} outputs" if labels else "a language model head"
        raise OptionsError(f"model {spec.name}: its checkpoint has {head}, so its role cannot be {spec.role}")
    return spec.role


def _card(spec: ModelSpec, model: Model, options: EngineOptions) -> ModelCard:
    config = model.config
    wanted = spec.max_model_len or options.max_model_len
    if spec.max_model_len is not None and spec.max_model_len > config.context:
        raise OptionsError(
            f"model {spec.name}: max_model_len {spec.max_model_len} exceeds its context of {config.context}"
        )
    return ModelCard(
        name=spec.name,
        role=_check_role(spec, config.labels),
        path=spec.path,
        architecture=config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        context=min(config.context, wanted or config.context),
        vocab_size=config.vocab_size,
        end_ids=tuple(sorted({*config.end_ids, *tokenizer_end_ids(Path(spec.path))})),
        labels=config.labels,
        weight_version=0,
        created=int(time.time()),
        aliases=spec.aliases,
    )


def tokenizer_end_ids(directory: Path) -> set[int]:
    """The id of the tokenizer's own end-of-text token, where its configuration names one and its files know it."""
    config = _read_object(directory / "tokenizer_config.json")
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = cast("dict[str, Any]", token).get("content")
    if not isinstance(token, str):
        return set()
    listed: dict[str, Any] = config.get("added_tokens_decoder") or {}
    if ids := {int(number) for number, entry in listed.items() if entry["content"] == token}:
        return ids
    whole = _read_object(directory / "tokenizer.json")
    added: list[dict[str, Any]] = whole.get("added_tokens") or []
    if ids := {int(entry["id"]) for entry in added if entry["content"] == token}:
        return ids
    model: dict[str, Any] = whole.get("model") or {}
    vocabulary = model.get("vocab")  # SentencePiece's Unigram has a list there; its special tokens are listed as added
    number = cast("dict[str, int]", vocabulary).get(token) if isinstance(vocabulary, dict) else None
    return set() if number is None else {number}


def _read_object(path: Path) -> dict[str, Any]:
    """Empty where the file is missing or broken: the tokenizer's own loader says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}
