"""What becomes of a model's matrices: the schemes in which they may be kept, one class each, by name in SCHEMES.

Every scheme keeps a matrix [O, D] in int8 with a float32 scale for each of its O outputs (`ops.quantize_rows`), and
they differ in what is multiplied by it. Embeddings, norms, biases and heads for scores and values stay as they are.
"""

# torch leaves the type of Tensor.split partly open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.ops import Activation, Int8
from .errors import CheckpointError

SchemeName = Literal["none", "int8", "w8a8"]  # none: in the model's own dtype
WantedScheme = Literal["auto", "none", "int8", "w8a8"]  # auto: as the checkpoint has it
WantedHead = Literal["auto", "int8", "fp16"]  # auto: as the other matrices; fp16: in the model's own dtype
ELEMENTS = 1 << 18  # that are quantized at once: what is made on the way takes 3 MiB at most
DEVICE_ELEMENTS = 1 << 24  # the same on a CUDA device, where a step of it takes longer to begin


class Scheme(Protocol):
    """How rows are multiplied by a matrix in int8. `depth`: see `ops.pack_int8`."""

    @property
    def depth(self) -> int: ...

    def product(
        self, x: Tensor, weight: Int8, bias: Tensor | None, activation: Activation | None, deterministic: bool
    ) -> Tensor:
        """`ops.linear` with such a matrix."""
        ...


class W8A16:
    """Rows as they are. A step that is bound by reading matrices takes half the time that it takes in 16 bits."""

    depth = 2

    def product(
        self, x: Tensor, weight: Int8, bias: Tensor | None, activation: Activation | None, deterministic: bool
    ) -> Tensor:
        return ops.linear_int8(x, weight, bias, activation, deterministic)


class W8A8:
    """Rows in int8, too, each with a scale of its own that is found as it comes: prompts and scores are bound by
    arithmetic, and whole numbers multiply faster. The sums are exact, so that every row is deterministic."""

    depth = 4

    def product(
        self, x: Tensor, weight: Int8, bias: Tensor | None, activation: Activation | None, deterministic: bool
    ) -> Tensor:
        return ops.linear_w8a8(*ops.quantize_rows(x), weight, bias, activation, x.dtype)


SCHEMES: Mapping[SchemeName, Scheme] = MappingProxyType({"int8": W8A16(), "w8a8": W8A8()})


class Quantization(NamedTuple):
    """Of one model: the scheme of its decoder's matrices, and that of a language model's head.

    `plain`: the decoder's matrices that stay in the model's dtype all the same, by the checkpoint's names without the
    family's prefix.
    """

    matrices: SchemeName = "none"
    head: SchemeName = "none"
    plain: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        return self.matrices != "none" or self.head != "none"


PLAIN = Quantization()


def quantization_of(
    wanted: WantedScheme, head: WantedHead, has_head: bool, stored: Quantization = PLAIN
) -> Quantization:
    """What is asked for, of a checkpoint that is kept as `stored`. Raises CheckpointError where that cannot be.

    A head that is quantized keeps the dtype of its rows: they are few, and its logits are what is sampled from.
    """
    if wanted not in ("auto", "none", *SCHEMES):
        raise CheckpointError(f"quantization is {wanted}; there are none, {', '.join(SCHEMES)}")
    if head not in ("auto", "int8", "fp16"):
        raise CheckpointError(f"lm_head is {head}; there are int8 and fp16, which is the model's own dtype")
    if head != "auto" and not has_head:
        raise CheckpointError(f"lm_head is {head}, but it has no language model's head: leave that out")
    if stored.any and wanted not in ("auto", stored.matrices):
        raise CheckpointError(
            f"quantization is {wanted}, but the checkpoint is quantized already, as {stored.matrices}: leave that out, "
            "or give the checkpoint that it was made from"
        )
    if stored.head != "none" and head == "fp16":
        raise CheckpointError("lm_head is fp16, but the checkpoint has its head in int8: leave that out")
    matrices = stored.matrices if wanted == "auto" else wanted
    as_matrices = stored.head == "int8" if stored.any else matrices != "none"
    narrow = has_head and (head == "int8" or (head == "auto" and as_matrices))
    return Quantization(matrices, "int8" if narrow else "none", stored.plain)


def quantize_into(matrix: Tensor, into: Int8) -> bool:
    """`ops.quantize_rows` of a matrix [O, D], wherever it is, some rows at a time on the device of `into`.

    Whether all its numbers are finite: one that is not makes its whole row useless.
    """
    rows = max(1, (ELEMENTS if into.values.device.type == "cpu" else DEVICE_ELEMENTS) // matrix.shape[1])
    blocks = list(zip(matrix.split(rows), into.values.split(rows), into.scale.split(rows), strict=True))
    extremes = torch.empty(len(blocks), 2, dtype=matrix.dtype, device=into.values.device)
    for (block, values, scale), (least, most) in zip(blocks, extremes, strict=True):
        block = block.to(values.device, non_blocking=True).contiguous()
        torch.aminmax(block, out=(least, most))
        found = ops.quantize_rows(block)
        values.copy_(found.values)
        scale.copy_(found.scale)
    return bool(extremes.isfinite().all())


def dequantized(matrix: Int8) -> Tensor:
    """[O, D] float32."""
    return matrix.values.float().mul_(matrix.scale.unsqueeze(-1))
