"""What one model's scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What happened since the start, for metrics."""

    started: int = 0  # requests that began to run
    prompt_tokens: int = 0  # of those
    cached_tokens: int = 0  # of which were found in the prefix cache
    computed_tokens: int = 0  # in all plans, recomputed ones included
    generated_tokens: int = 0
    preemptions: int = 0
