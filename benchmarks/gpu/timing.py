"""Samples of a duration: median and the middle 80 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    median: float
    low: float
    high: float
    samples: int
    graph: bool = False  # replays of a CUDA graph: the device's time without the host's


def timing_of(seconds: Sequence[float], graph: bool = False) -> Timing:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    low, median, high = (ordered[round(part * last)] for part in (0.1, 0.5, 0.9))
    return Timing(median, low, high, len(ordered), graph)
