"""What a section is run with, and what the sections before it found."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ...model.config import ModelConfig
from .rows import Row
from .shapes import NAMES, REAL, TINY, Shape, config_of

T = TypeVar("T")


class Limits(NamedTuple):
    """What the machine did in the same run; the denominators of every share."""

    read: float  # bytes per second, read alone
    copy: float  # bytes per second, read and written
    float16: float  # operations per second of a large matrix product
    bfloat16: float
    int8: float

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second; float32 (no goal is set for it) has none of its own."""
        return {torch.float16: self.float16, torch.int8: self.int8}.get(dtype, self.bfloat16)


@dataclass(frozen=True)
class Setting:
    """`tiny`: shapes that a CPU runs in a moment, to test the suite itself."""

    device: torch.device
    out: Path  # folder of the results
    tiny: bool = False
    fa3: Path | None = None  # FlashAttention-3 as a library of vLLM
    ends: float = float("inf")  # time.monotonic() at which the section is stopped

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.ends - time.monotonic()

    def pick(self, full: T, tiny: T) -> T:
        return tiny if self.tiny else full

    def shape(self, name: str) -> Shape:
        return (TINY if self.tiny else REAL)[name]

    def config(self, name: str) -> ModelConfig:
        return config_of(self.shape(name))

    def title(self, name: str) -> str:
        return f"tiny {name}" if self.tiny else NAMES[name]

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """Half precision is for CUDA: a CPU takes many times as long with it."""
        return wanted if self.cuda else torch.float32

    @property
    def limits(self) -> Limits:
        rows = {row.name: row.figure for row in self.found("limits")}
        figures = [rows.get(name) for name in ("read", "copy", "float16", "bfloat16", "int8")]
        unknown = float("nan")  # a share of what could not be measured is no number
        return Limits(*(unknown if figure is None else figure * 1e12 for figure in figures))

    def found(self, section: str) -> list[Row]:
        """The rows of a section that has ended, none where it has not run."""
        file = self.out / f"{section}.json"
        if not file.exists():
            return []
        return [Row(**row) for row in json.loads(file.read_text())["rows"]]

    def figure(self, section: str, name: str) -> float | None:
        return next((row.figure for row in self.found(section) if row.name == name), None)
