"""Room for low-rank adapters beside every matrix of a decoder, and the step in which rows take one.

Letters: T rows of a step, S adapters, n matrices of the checkpoint in one `Linear`, r rank.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .linear import Linear, MatrixAdapters, RowAdapters, linears
from .slots import Place


class Adapter(NamedTuple):
    """One that is read and checked, and lies in host memory, in the model's dtype.

    `matrices`: of each `Linear` that it changes, by its dotted place, a [n r, ins] and b [r, sum(outs)], filled up with
    zeros to the rank that there is room for; b holds the scale.
    """

    path: Path
    rank: int  # its own largest one
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    tensors: int  # in its file, and
    bytes: int  # of these
    digest: str  # of its files


class Adapters:
    """`count` adapters of at most `rank`, numbered from 1. Whose number is free is the caller's to know."""

    def __init__(self, decoder: nn.Module, count: int, rank: int, place: Place) -> None:
        self.count, self.rank, self.place = count, rank, place
        self._rows = RowAdapters()
        self._beside: dict[str, MatrixAdapters] = {}
        for path, linear in linears(decoder):
            linear.adapters = self._beside[path] = MatrixAdapters(linear, count, rank, place, self._rows)

    @property
    def nbytes(self) -> int:
        return sum(one.a.nbytes + one.b.nbytes for one in self._beside.values())

    def staged(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Zeros in host memory, as `Adapter.matrices` has them for that matrix; for a GPU they are pinned."""
        shapes = (len(linear.outs) * self.rank, linear.ins), (self.rank, sum(linear.outs))
        pinned = self.place.device.type == "cuda"
        a, b = (torch.zeros(shape, dtype=self.place.dtype, pin_memory=pinned) for shape in shapes)
        return a, b

    @torch.inference_mode()
    def write(self, slot: int, adapter: Adapter) -> None:
        """Makes it number `slot`, between two steps."""
        for path, beside in self._beside.items():
            beside.write(slot, adapter.matrices.get(path))

    @contextmanager
    def beside(self, slots: Tensor | None) -> Generator[None]:
        """Inside, the rows of the step have these adapters: [T] int64, 0 is none; None: no row has one."""
        self._rows.slots = slots
        try:
            yield
        finally:
            self._rows.slots = None
