"""The tensors of one step.

Letters: T tokens of the step, R of them that are read, B sequences, M page-table width, S page size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.ops import Sequences


@dataclass(slots=True)
class Batch:
    """The rows of all sequences, decoding ones first. `sequences` says which row belongs to whom."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position in the row's own sequence
    slots: Tensor  # [T] int64, page * S + offset: where the row's K and V go
    sequences: Sequences
    adapters: Tensor | None = None  # [T] int64, slot of each row's adapter, 0 is none; None: no row has one
    read: Tensor | None = None  # [R] int64: whose hidden states are asked for, R > 0; None: all. Not with adapters

    def of_layers(self, count: int) -> Iterator[Batch]:
        """The batch for each of so many layers. All rows have K and V in every one, but behind the last one's attention
        only those that are read go on: of a prompt before its first token that saves most of a layer."""
        before = self if self.read is None else replace(self, read=None)
        for _ in range(count - 1):
            yield before
        yield self

    def kept(self, x: Tensor) -> Tensor:
        """Of x [T, …] the rows that go on behind this layer's attention, [R, …]."""
        return x if self.read is None else x[self.read]
