"""What one model's scheduler counts and measures, as Prometheus means counters and histograms."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial

# Upper bounds of buckets: fine enough for a tiny model on a CPU, wide enough for a long answer.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SECONDS = (0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 600.0)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
FEW = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SCORES = (-20.0, -10.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)

ENDS = ("stop", "length", "abort", "error")
BOUNDS = ("max_waiting_requests", "max_waiting_tokens")


@dataclass(slots=True)
class Histogram:
    """How many observations fell into each bucket: `counts[i]` those up to `bounds[i]` and above the bound before it,
    the last one those above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list[int])
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class Counts:
    """What happened since the start. Times are from the engine's receipt of a request, in seconds."""

    started: int = 0  # requests that began to run
    prompt_tokens: int = 0  # of those, and of the prompts of groups, once each
    cached_tokens: int = 0  # of which were found in the prefix cache
    forked_tokens: int = 0  # of prompts that further choices, and members of groups, took over from what computed them
    computed_tokens: int = 0  # in all plans, recomputed ones included
    generated_tokens: int = 0
    preemptions: int = 0
    scores: int = 0
    corrupted: int = 0  # requests that ended because something was not finite
    weight_updates: int = 0
    weight_update_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))  # staging and commit
    weight_commit_seconds: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN))  # while no step ran
    # Choices by how they ended; requests by the bound that refused them. All keys are there from the start.
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDS, 0))
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BOUNDS, 0))
    # Per request.
    request_prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    request_computed_tokens: Histogram = field(
        default_factory=partial(Histogram, TOKENS)
    )  # of the prompt, without those in the cache
    request_n: Histogram = field(default_factory=partial(Histogram, FEW[1:]))
    request_max_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    request_longest: Histogram = field(default_factory=partial(Histogram, TOKENS))  # tokens of its longest choice
    request_preemptions: Histogram = field(default_factory=partial(Histogram, FEW))
    queue_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))  # until it ran
    prefill_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))  # from there to its first token
    first_token_seconds: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN))
    decode_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))  # from the first token to the end
    inference_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))  # prefill and decode
    request_seconds: Histogram = field(default_factory=partial(Histogram, SECONDS))
    # Per choice, token, step, score.
    generation_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    token_seconds: Histogram = field(
        default_factory=partial(Histogram, NEXT_TOKEN)
    )  # mean over the tokens after a choice's first
    next_token_seconds: Histogram = field(default_factory=partial(Histogram, NEXT_TOKEN))
    step_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    score: Histogram = field(default_factory=partial(Histogram, SCORES))


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Gauges and counters of one model at one moment."""

    name: str
    role: str
    weight_version: int
    waiting: int
    running: int
    paused: bool
    page_size: int
    pages: int  # that it has now
    pages_used: int
    pages_cached: int
    pages_available: int  # that a request could get now, those of slabs that would be lent included
    slabs: int  # of the arena, lent to it
    counts: Counts
