"""The forms in which a matrix may be kept beside a plain tensor [outs, ins], and products with one in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a product in a fixed order on a CPU: with 16 a single float32 row takes 0.75 of the time, but a prompt of 512
# 1.2 (bfloat16 1.35) times as long, and 32 rows 1.25 (1.4) times.
BLOCK_ROWS = 32
PANEL = 16  # outputs of a packed matrix that are computed side by side


class Int8(NamedTuple):
    """Rows in int8: row r stands for values[r] · scale[r]. Of a matrix [O, D] a row is an output."""

    values: Tensor  # [R, D] int8, -127 … 127
    scale: Tensor  # [R] float32, positive


class Packed(NamedTuple):
    """A matrix [outs, ins] in panels of PANEL rows, which are computed side by side; what is beyond `outs` is 0.

    `data` is [panels, ins / 2, PANEL, 2] in bfloat16 and [panels, ins, PANEL] in float32, `ins` rounded up to an even
    number; what is beyond it is 0, too.
    """

    data: Tensor
    outs: int
    ins: int

    def unpack(self) -> Tensor:
        """[outs, ins], in the dtype it is kept in."""
        panels = self.data.transpose(1, 2) if self.data.dim() == 4 else self.data.mT  # [panels, PANEL, ins (/ 2, 2)]
        return panels.reshape(len(panels) * PANEL, -1)[: self.outs, : self.ins]


class PackedInt8(NamedTuple):
    """An int8 matrix [outs, ins] in the order of its device's products, with its outputs' scales.

    `depth`: neighbouring columns of one output that lie side by side, 2 for products with floats and 4 for those with
    int8. `data` is [panels, ins / depth, PANEL, depth] int8, and 0 beyond `outs` and `ins`. `totals`: Σ values of each
    output, for products with int8.
    """

    data: Tensor
    scale: Tensor  # [panels · PANEL] float32
    totals: Tensor | None  # [panels · PANEL] int32
    outs: int
    ins: int

    @property
    def depth(self) -> int:
        return self.data.shape[3]

    def unpack(self) -> Int8:
        """[outs, ins] and [outs]."""
        panels = self.data.transpose(1, 2)  # [panels, PANEL, ins / depth, depth]
        values = panels.reshape(len(panels) * PANEL, -1)[: self.outs, : self.ins]
        return Int8(values, self.scale[: self.outs])


def in_blocks(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) [T, O] of x [T, D], BLOCK_ROWS rows at a time, the last block filled up with zeros.

    Libraries choose the order of a product's sums by its shape, so that 1 row, 2 rows and 257 rows have other bits
    (oneDNN and MKL, in all dtypes). Products of one shape have one order, the same for every row in them.
    """
    count = x.shape[0]
    blocks = F.pad(x, (0, 0, 0, -count % BLOCK_ROWS)).split(BLOCK_ROWS)
    return torch.cat([product(block) for block in blocks])[:count]
