"""Low-rank adapters on CPUs, in float32 and bfloat16 throughout; others are the definition's. See low_rank.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import ops
from .native import MOST_INNER, Lora, at, native, number


def lora(x: Tensor, a: Tensor, b: Tensor, outs: tuple[int, ...], slots: Tensor, y: Tensor) -> None:
    found, kind = native(), number(x.dtype)
    rank, parts = b.shape[1], len(outs)
    alike = all(tensor.dtype == x.dtype and tensor.is_contiguous() for tensor in (x, a, b, y))
    if found is None or kind is None or not alike or rank % 4 or parts * rank > MOST_INNER:
        ops.lora.__wrapped__(x, a, b, outs, slots, y)
        return
    assert a.shape[1:] == (parts * rank, x.shape[1]) and b.shape[2] == y.shape[1] == sum(outs)
    assert slots.shape == (len(x),) and slots.dtype == torch.int64 and slots.is_contiguous()
    widths = (ctypes.c_long * parts)(*outs)
    shape = (x.shape[0], x.shape[1], parts, rank, kind)
    call = Lora(at(x), at(a), at(b), at(slots), ctypes.addressof(widths), at(y), *shape)
    call.held = widths  # as long as the call, which a recording keeps
    found.run("tandem_lora", call)
