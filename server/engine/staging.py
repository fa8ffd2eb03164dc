"""Arrays of integers that a step sends to its device, all of them in one copy."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEPTH = 3  # steps whose copies may be on their way: one that runs, one that is launched, one that is written


class Staging:
    """A ring of host buffers; on CUDA they are pinned, and a buffer is written again only once its copy is over."""

    def __init__(self, device: torch.device, size: int = 1 << 14) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._buffers = [self._buffer(size) for _ in range(DEPTH)]
        self._copied = [torch.cuda.Event() for _ in range(DEPTH)] if self._cuda else []
        self._next = 0

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays, int64, on the device."""
        sizes = [array.size for array in arrays]
        total = sum(sizes)
        if not total:
            return [torch.empty(array.shape, dtype=torch.int64, device=self._device) for array in arrays]
        place, self._next = self._next, (self._next + 1) % DEPTH
        if self._cuda:
            self._copied[place].synchronize()
        if self._buffers[place].numel() < total:
            self._buffers[place] = self._buffer(2 * total)
        buffer = self._buffers[place][:total]
        np.concatenate([array.ravel() for array in arrays], out=buffer.numpy(), casting="same_kind")
        if self._cuda:
            sent = buffer.to(self._device, non_blocking=True)
            self._copied[place].record()
        else:
            sent = buffer.clone()
        return [part.view(array.shape) for part, array in zip(sent.split(sizes), arrays, strict=True)]

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=self._cuda)
