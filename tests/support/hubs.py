"""Engines on tiny checkpoints, and what their outputs add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB

from tandem.server.engine.engine import Engine
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import EngineError, Logprobs, Output, Request, Sampling
from tandem.server.text.matching import load_grammars


def make_hub(*paths: Path, pages: int | None = None, **options: Any) -> Hub:
    """The checkpoints in one hub, named as their directories. `pages` overrides how many each KV cache has."""
    given: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    specs = [ModelSpec(path.name, str(path)) for path in paths]
    hub = Hub.load(specs, EngineOptions(**(given | options)), grammars=load_grammars)
    if pages is None:
        return hub
    small = EngineOptions(**(given | options))
    engines = [Engine(e.card, e.runner.model, pages=pages, options=small, grammars=load_grammars) for e in hub.engines]
    return Hub(engines)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()  # no special token of the first three


def generate(number: int, model: str, token_ids: list[int], n: int = 1, **sampling: Any) -> Request:
    """A request for tokens; greedy, 16 tokens and seed 0 unless told otherwise."""
    given: dict[str, Any] = {"max_tokens": 16, "seed": 0, "temperature": 0.0}
    return Request(number, model, token_ids, Sampling(**(given | sampling)), n=n)


def score(number: int, model: str, token_ids: list[int]) -> Request:
    return Request(number, model, token_ids, None, frozenset({"score"}))


@dataclass
class Answer:
    """One choice, its outputs put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=Logprobs)
    finish: str | None = None
    stop_id: int | None = None
    error: EngineError | None = None
    scores: list[float] | None = None
    pooled_index: int | None = None
    values: list[float] | None = None
    embedding: list[float] | None = None
    cached_tokens: int | None = None
    prompt_logprobs: Logprobs | None = None


def collect(outputs: Iterable[Output]) -> dict[int, Answer]:
    """By choice. Fails where a choice goes on after its end."""
    answers: dict[int, Answer] = {}
    for output in outputs:
        answer = answers.setdefault(output.choice, Answer())
        assert answer.finish is None, f"choice {output.choice} went on after {answer.finish}"
        answer.token_ids += output.token_ids
        answer.finish = output.finish
        answer.stop_id, answer.error = output.stop_id, output.error
        answer.scores = output.scores or answer.scores
        answer.pooled_index = answer.pooled_index if output.pooled_index is None else output.pooled_index
        answer.values = output.values or answer.values
        answer.embedding = output.embedding or answer.embedding
        answer.cached_tokens = answer.cached_tokens if output.cached_tokens is None else output.cached_tokens
        answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
        if output.logprobs:
            for name in ("values", "ranks", "top_ids", "top_values", "policy"):
                getattr(answer.logprobs, name).extend(getattr(output.logprobs, name))
    return answers


def answer(hub: Hub, *requests: Request) -> list[Answer]:
    """The first choice of each request, all run together; nothing may be left behind."""
    outputs = hub.run(requests)
    answers = [collect(outputs[request.id]) for request in requests]
    assert all(one.finish for choices in answers for one in choices.values())
    assert_nothing_is_held(hub)
    return [choices[0] for choices in answers]


def assert_nothing_is_held(hub: Hub) -> None:
    for engine in hub.engines:
        pages = engine.scheduler.pages
        assert not engine.scheduler.running and not engine.scheduler.waiting
        assert pages.used == 0 and pages.free + pages.cached == pages.held
