"""What operations take and give beside tensors. Letters as in `ops.py`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

PANEL = 16  # outputs of a packed matrix that are computed side by side


class Sequences(NamedTuple):
    """Which rows belong to which sequence, and where its K and V are. Row counts, not tokens, are what T counts.

    The first `decodes` sequences have exactly one row each. `lengths` counts the K/V of a sequence including this
    step's rows, which are its last ones. Entries of `page_table` past a sequence's last page may hold anything. A
    decoding sequence of length 0 is padding: its row's result is 0.
    """

    query_starts: Tensor  # [B + 1] int32
    lengths: Tensor  # [B] int32
    page_table: Tensor  # [B, M] int32
    decodes: int
    max_query: int
    max_length: int
    work: Tensor | None = None  # `attention_work` of these lengths; without it every layer makes its own on CUDA
    deterministic: bool = False  # a row's bits depend on its own position, K and V only
    backend: Literal["triton", "flash", "torch"] = "triton"  # what computes attention on CUDA
    memo: dict[Any, Any] | None = (
        None  # empty at first; the definition keeps here what it need not find out in each layer
    )


class KVLayer(NamedTuple):
    """The pages of one layer. int8 values stand for value * scale, one scale per token and kv head."""

    k: Tensor  # [P, K, S, H]
    v: Tensor  # [P, K, S, H]
    k_scale: Tensor | None = None  # [P, K, S] float16
    v_scale: Tensor | None = None


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens; `top_*` has as many columns as were asked for, most likely first."""

    values: Tensor  # [T] float32
    ranks: Tensor  # [T] int64, 1 is the most likely
    top_values: Tensor  # [T, top] float32
    top_ids: Tensor  # [T, top] int64


class Int8(NamedTuple):
    """Rows in int8: row r stands for values[r] · scale[r]. Of a matrix [O, D] a row is an output."""

    values: Tensor  # [R, D] int8, -127 … 127; a checkpoint that others quantized may hold -128
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
