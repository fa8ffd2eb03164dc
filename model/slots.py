"""Where the tensors of a checkpoint go: every module with weights names the places that the loader fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..kernels.ops import Int8
from .quantization import PLAIN, Quantization, quantize_into


class Place(NamedTuple):
    """The precision and the device in which a module's weights live, and whether its results may depend on batches.

    `deterministic`: they do not; a row has the same bits whatever rows are computed with it. `pinned`: in host memory
    that a GPU can copy from by itself. `quantization`: how matrices are kept, for `Linear` alone.
    """

    dtype: torch.dtype
    device: torch.device
    deterministic: bool = False
    pinned: bool = False
    quantization: Quantization = PLAIN

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device, pin_memory=self.pinned)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class Slot(NamedTuple):
    """One checkpoint tensor and the storage it is copied into.

    `name` is the tensor's name in the checkpoint, without the family's prefix; `into` is a weight or one part of a
    fused one. `transposed`: the checkpoint stores it [ins, outs] (GPT-2's Conv1D). `optional`: what `into` already
    holds stands where the checkpoint has no such tensor. `change`: what is kept of the tensor, in its shape, where that
    is not the tensor itself (an order of rows, Gemma's 1 + weight). Slots with the same storage are tied: one of them
    is enough. `scale` [outs]: `into` is int8, and a tensor is quantized row by row when it is written.
    """

    name: str
    into: Tensor
    transposed: bool = False
    optional: bool = False
    change: Callable[[Tensor], Tensor] | None = None
    scale: Tensor | None = None

    def kept(self, stored: Tensor, upright: bool = False) -> Tensor:
        """What `into` holds of the checkpoint's tensor, in the tensor's dtype or a wider one. `upright`: it is not
        transposed after all."""
        stored = stored.T if self.transposed and not upright else stored
        return stored if self.change is None else self.change(stored)

    def write(self, kept: Tensor) -> bool:
        """Fills `into` with what `kept` gave, rounded to its dtype or quantized. False: what was quantized was not
        finite."""
        if self.scale is not None:
            return quantize_into(kept, Int8(self.into, self.scale))
        self.into.copy_(kept)
        return True

    def take(self, other: Slot) -> None:
        """Fills `into` with what the same slot of another model holds, bit by bit."""
        self.into.copy_(other.into)
        if self.scale is not None:
            assert other.scale is not None, self.name
            self.scale.copy_(other.scale)

    def write_int8(self, values: Tensor, scale: Tensor, upright: bool) -> None:
        """Fills `into` with a matrix that the checkpoint has in int8, and a scale for each output."""
        assert self.scale is not None, self.name
        self.into.copy_(self.kept(values, upright))
        self.scale.copy_(scale if self.change is None else self.change(scale))

    def shape_of(self, upright: bool = False) -> tuple[int, ...]:
        """The shape the checkpoint's tensor must have."""
        return tuple(reversed(self.into.shape)) if self.transposed and not upright else tuple(self.into.shape)


@runtime_checkable
class HasSlots(Protocol):
    """A module with weights of its own. `path` is the module's dotted place in the decoder."""

    def slots(self, path: str) -> Iterator[Slot]: ...
