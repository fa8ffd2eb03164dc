"""Matrices of a model: the only place that knows fusion, storage order, shard slices and second copies.

A family writes `Linear(("q_proj", "k_proj", "v_proj"), ins, (N·H, K·H, K·H), place, split="column")` and calls it. One
with an `activation` behind it (gate and up, say) names that, too: the device may compute both at once.

On CPUs a float32 matrix is kept in oneDNN's blocked order. A plain one is brought into such an order again by every
product of more than one row: 67M parameters take 32 ms instead of 17 at 2 rows, 44 instead of 27 at 8, 56 instead of 42
at 16 (AVX2, one core), the same at 1 and from 64 on.

In deterministic mode a row's bits depend on that row alone: on CPUs all products have one shape (`ops.in_blocks`).
"""

# torch leaves the types of named_modules and of torch.ops open.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import Activation
from .errors import CheckpointError
from .slots import Place, Slot

Split = Literal["column", "row", "vocab", "none"]  # which dimension several devices would share: outs, ins, rows of V

DECODE_ROWS = 2  # up to so many rows are read from the decode copy
PACKED_FOR = 16  # rows for which oneDNN chooses the blocked order; it serves all other counts as fast


class Linear(nn.Module):
    """y = activation(x Wᵀ + b), where W [sum(outs), ins] holds several matrices of the checkpoint, one below the other.

    `names` and `outs` go together: the checkpoint has `names[i]`, with `outs[i]` outputs, where this module stands.
    `stored_transposed`: the checkpoint keeps [ins, outs]. `weight`: storage to share instead of an own one (tied
    embeddings). `split`: how the matrix is divided over devices; on one it changes nothing.
    """

    plain: Tensor | None  # [sum(outs), ins]
    packed: Tensor | None = None  # the same in oneDNN's order
    decode_weight: Tensor | None = None
    decode_bias: Tensor | None = None
    activation: Activation | None

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
        weight: Tensor | None = None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.deterministic = activation, place.deterministic
        self.names, self.ins, self.outs, self.split, self.stored_transposed = names, ins, outs, split, stored_transposed
        self.plain = nn.Buffer(place.empty(sum(outs), ins) if weight is None else weight)
        self.bias = nn.Buffer(place.empty(sum(outs))) if bias else None

    @property
    def weight(self) -> Tensor:
        """[sum(outs), ins]: the matrix itself, or a copy of it where only the packed form is kept."""
        if self.plain is not None:
            return self.plain
        assert self.packed is not None
        return self.packed.to_dense()

    @property
    def copy_bytes(self) -> int:
        """What is held beside the plain matrix and the bias."""
        copies = (self.packed, self.decode_weight, self.decode_bias)
        return sum(copy.numel() * copy.element_size() for copy in copies if copy is not None)

    def slots(self, path: str) -> Iterator[Slot]:
        inside = path.rpartition(".")[0]
        for index, (name, weight) in enumerate(zip(self.names, self.weight.split_with_sizes(self.outs), strict=True)):
            full = f"{inside}.{name}" if inside else name
            yield Slot(f"{full}.weight", weight, transposed=self.stored_transposed)
            if self.bias is not None:
                yield Slot(f"{full}.bias", self.bias.split_with_sizes(self.outs)[index])

    def add_decode_copy(self, path: str) -> None:
        """Keep a float16 copy for steps of one or two rows, whose time is that of reading the weights once.

        Raises CheckpointError that names the tensor which float16 cannot hold.
        """
        for slot in self.slots(path):
            if not slot.into.half().isfinite().all():
                raise CheckpointError(
                    f"tensor {slot.name} has values that float16 cannot hold: leave out --cpu-decode-copy fp16"
                )
        self.decode_weight = self.weight.half()
        self.decode_bias = None if self.bias is None else self.bias.half()

    def pack(self) -> None:
        """Change to oneDNN's order where that serves: float32 on a CPU."""
        assert self.plain is not None
        if (
            self.plain.device.type == "cpu"
            and self.plain.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, PACKED_FOR)
            self.plain = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, ins] -> [T, sum(outs)], with silu_and_mul half as many; x's dtype."""
        if self.decode_weight is not None and x.shape[0] <= DECODE_ROWS:
            narrow = x.clamp(-65504, 65504).half()
            return ops.activate(F.linear(narrow, self.decode_weight, self.decode_bias).to(x.dtype), self.activation)
        if self.packed is None:
            return ops.linear(x, self.weight, self.bias, self.activation, self.deterministic)
        y = ops.in_blocks(self._packed_product, x) if self.deterministic else self._packed_product(x)
        return ops.activate(y, self.activation, by_row=self.deterministic)

    def _packed_product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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
