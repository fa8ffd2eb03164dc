"""The tensors of one step.

Letters: T tokens of the step, B sequences, M page-table width, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass

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
