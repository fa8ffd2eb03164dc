"""What repeated measurements say: percentiles, spreads, interleaved rounds and ratios. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and the middle 80 % of some samples."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    samples: int


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile (0 <= p <= 100), interpolated linearly between closest ranks: numpy's default.

    Raises ValueError for no values or another p.
    """
    if not values:
        raise ValueError("no values have no percentile")
    if not 0 <= p <= 100:
        raise ValueError(f"percentile {p}: from 0 to 100")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * p / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    return Spread(percentile(values, 50), percentile(values, 10), percentile(values, 90), len(values))


def interleaved(
    sides: Mapping[str, Callable[[int], T]],
    rounds: int,
    warmups: int = 1,
    on_done: Callable[[str, int], None] | None = None,
) -> dict[str, list[T]]:
    """Every side once per round, one after the other: A B, B A, A B, …; what drifts meanwhile falls on all alike.

    A side is called with the number of the round. Warm-ups come first, are numbered -warmups … -1 and are not in
    the result. `on_done(side, round)` is told of every call that has ended.
    """
    if rounds < 1 or warmups < 0:
        raise ValueError(f"{rounds} rounds after {warmups} warm-ups: at least 1 and 0")
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(-warmups, rounds):
        names = list(sides)
        for name in names if number % 2 == 0 else reversed(names):
            result = sides[name](number)
            if number >= 0:
                found[name].append(result)
            if on_done is not None:
                on_done(name, number)
    return found


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of the quotients, round by round. Raises ValueError where one side has another number of rounds."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds against {len(denominator)}")
    return spread([one / other for one, other in zip(numerator, denominator, strict=True)])
