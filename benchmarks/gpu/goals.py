"""What the suite must reach on one H200, in one place; each is judged by figures of one run.

A goal looks at a row's figure or at its share (what the hardware allows, over what was taken).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Goal:
    measure: Literal["figure", "share"]
    compare: Literal["<=", ">="]
    bound: float
    unit: str = ""

    def met(self, value: float) -> bool:
        return (operator.le if self.compare == "<=" else operator.ge)(value, self.bound)

    def __str__(self) -> str:
        sign = "≤" if self.compare == "<=" else "≥"
        if self.measure == "share" or self.unit == "%":
            return f"{sign} {self.bound:.0%}" if self.bound >= 0.1 else f"{sign} {self.bound:.1%}"
        return f"{sign} {self.bound:g} {self.unit}".rstrip()


GOALS: Mapping[str, Goal] = MappingProxyType(
    {
        "correct": Goal("figure", "<=", 0, "failures"),
        "greedy fp32": Goal("figure", "<=", 1e-3, "nats"),  # gap of the two best where greedy texts part
        "greedy half": Goal("figure", "<=", 0.1, "nats"),
        "batch 1": Goal("share", ">=", 0.85),  # of the read bandwidth
        "batch 1 int8": Goal("figure", ">=", 1.75, "×"),  # as fast as own fp16
        "GPT-2 batch 1": Goal("figure", "<=", 0.35, "ms"),
        "256 × 1k": Goal("figure", "<=", 1.3, "×"),  # the memory floor
        "256 × 1k int8": Goal("figure", ">=", 1.7, "×"),  # as fast as bf16
        "prefill": Goal("share", ">=", 0.65),  # of the same run's cuBLAS peak
        "decode attention": Goal("share", ">=", 0.85),  # of the read bandwidth
        "decode attention against FA3": Goal("figure", ">=", 1.0, "×"),
        "scoring against unshared": Goal("figure", ">=", 2.2, "×"),
        "scoring against transformers": Goal("figure", ">=", 3.0, "×"),
        "sampling plain": Goal("figure", "<=", 30, "µs"),
        "sampling top-k + top-p": Goal("figure", "<=", 100, "µs"),
        "host work": Goal("figure", "<=", 150, "µs"),
        "idle": Goal("figure", "<=", 0.02, "%"),
        "start warm": Goal("figure", "<=", 8, "s"),
        "start cold": Goal("figure", "<=", 20, "s"),
        "KV memory": Goal("figure", ">=", 0.97, "%"),  # of what the formula leaves
        "int8 KV": Goal("figure", ">=", 1.9, "×"),  # as many tokens
    }
)
