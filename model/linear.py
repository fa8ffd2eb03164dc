"""Matrices of a model: the only place that knows fusion, storage order, quantization and shard slices.

A family writes `Linear(("q_proj", "k_proj", "v_proj"), ins, (N·H, K·H, K·H), place, split="column")` and calls it. One
with an `activation` behind it (gate and up, say) names that, too: the device may compute both at once.

How a matrix is kept, and multiplied, is `matrix.py`'s: in the model's dtype or as its scheme says.

A matrix may have low-rank adapters beside it (`adapters.py`); which one a row takes is the step's, not the family's.
"""

# torch leaves the types of named_modules open.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import Activation, Packed, PackedInt8
from .matrix import Int8Matrix, PlainMatrix
from .quantization import SchemeName
from .slots import Place, Slot

Split = Literal["column", "row", "vocab", "none"]  # which dimension several devices would share: outs, ins, rows of V


class RowAdapters:
    """The adapter of each row of the step that is being computed, [T] int64 (0: none), for all matrices of a decoder.

    None outside of steps, and in those that have no row with an adapter.
    """

    slots: Tensor | None = None


class MatrixAdapters:
    """Low-rank adapters beside one matrix: a [S, n r, ins] and b [S, r, sum(outs)] as in `ops.lora`, at first zeros."""

    def __init__(self, linear: Linear, count: int, rank: int, place: Place, rows: RowAdapters) -> None:
        self.outs, self._rows = linear.outs, rows
        self.a = place.zeros(count, len(linear.outs) * rank, linear.ins)
        self.b = place.zeros(count, rank, sum(linear.outs))
        self._held: set[int] = set()  # adapters that have a part here

    @property
    def of_step(self) -> Tensor | None:
        """The slots, if a row of this step may have an adapter here. A recorded step also serves those to come."""
        slots = self._rows.slots
        return slots if slots is not None and (self._held or slots.is_cuda) else None

    def write(self, slot: int, parts: tuple[Tensor, Tensor] | None) -> None:
        """Makes a [n r, ins] and b [r, sum(outs)] adapter `slot`'s; None: it has no part here."""
        if parts is not None:
            self.a[slot - 1].copy_(parts[0], non_blocking=True)
            self.b[slot - 1].copy_(parts[1], non_blocking=True)
            self._held.add(slot)
        elif slot in self._held:
            self.b[slot - 1].zero_()
            self._held.remove(slot)


class Linear(nn.Module):
    """y = activation(x Wᵀ + b), where W [sum(outs), ins] holds several matrices of the checkpoint, one below the other.

    `names` and `outs` go together: the checkpoint has `names[i]`, with `outs[i]` outputs, where this module stands.
    `stored_transposed`: the checkpoint keeps [ins, outs]. `order` [outs]: row i here is row order[i] of the
    checkpoint's matrix, and of its bias. `weight`: storage to share instead of an own one (tied embeddings), or to be
    quantized from. `scheme`: instead of the place's. `split`: how the matrix is divided over devices; on one it changes
    nothing.
    """

    matrix: PlainMatrix | Int8Matrix
    activation: Activation | None
    reordered: Callable[[Tensor], Tensor] | None
    adapters: MatrixAdapters | None = None

    def __init__(
        self,
        names: tuple[str, ...],
        ins: int,
        outs: tuple[int, ...],
        place: Place,
        *,
        split: Split,
        bias: bool = False,
        stored_transposed: bool = False,
        order: Tensor | None = None,
        weight: Tensor | None = None,
        activation: Activation | None = None,
        scheme: SchemeName | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.deterministic = activation, place.deterministic
        self.names, self.ins, self.outs, self.split, self.stored_transposed = names, ins, outs, split, stored_transposed
        assert order is None or len(names) == 1
        self.reordered = None if order is None else lambda stored: stored[order]
        scheme = place.quantization.matrices if scheme is None else scheme
        if scheme == "none":
            self.matrix = PlainMatrix(sum(outs), ins, place, weight)
        else:
            self.matrix = Int8Matrix(scheme, sum(outs), ins, place, weight)
        self.bias = nn.Buffer(place.empty(sum(outs))) if bias else None

    @property
    def quantized(self) -> bool:
        return isinstance(self.matrix, Int8Matrix)

    @property
    def packed(self) -> Packed | PackedInt8 | None:
        """The matrix in its device's own order, where it is kept so."""
        return self.matrix.packed

    @property
    def weight(self) -> Tensor:
        """[sum(outs), ins] in the model's dtype: the matrix itself, or a copy where it is kept otherwise."""
        return self.matrix.weight

    @property
    def packed_bytes(self) -> int:
        """Of what is no buffer of this module."""
        return self.matrix.packed_bytes

    def places(self, path: str) -> list[str]:
        """Where the checkpoint has each of the matrices, in dots."""
        inside = path.rpartition(".")[0]
        return [f"{inside}.{name}" if inside else name for name in self.names]

    def slots(self, path: str) -> Iterator[Slot]:
        parts = zip(self.places(path), self.matrix.parts(self.outs), strict=True)
        for index, (full, (weight, scale)) in enumerate(parts):
            yield Slot(f"{full}.weight", weight, transposed=self.stored_transposed, change=self.reordered, scale=scale)
            if self.bias is not None:
                yield Slot(f"{full}.bias", self.bias.split_with_sizes(self.outs)[index], change=self.reordered)

    def keep_plain(self, place: Place) -> None:
        """Before it is filled: the matrix is not quantized after all."""
        self.matrix = PlainMatrix(sum(self.outs), self.ins, place)

    def finish(self, pack: bool = True) -> None:
        """All slots are filled. `pack`: change to the device's own order, if it has one."""
        self.matrix.finish(pack, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, ins] -> [T, sum(outs)], with silu_and_mul half as many; x's dtype.

        A row without an adapter has the same bits whether or not others of the step have one: on CPUs always, on CUDA
        in deterministic mode.
        """
        slots = None if self.adapters is None else self.adapters.of_step
        if self.adapters is None or slots is None:
            return self.matrix.product(x, self.bias, self.activation)
        y = self.matrix.product(x, self.bias, None)
        ops.lora(x, self.adapters.a, self.adapters.b, self.outs, slots, y)
        return ops.activate(y, self.activation, by_row=self.deterministic and not x.is_cuda)


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every matrix in `module` with its dotted place."""
    for path, part in module.named_modules():
        if isinstance(part, Linear):
            yield path, part


class Embedding(nn.Module):
    """Rows of a [V, D] matrix by id. The checkpoint's name for it is the module's own."""

    def __init__(self, rows: int, size: int, place: Place) -> None:
        super().__init__()
        self.weight = nn.Buffer(place.empty(rows, size))

    def slots(self, path: str) -> Iterator[Slot]:
        yield Slot(f"{path}.weight", self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, D]."""
        return F.embedding(ids, self.weight)
