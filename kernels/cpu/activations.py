"""Activations on CPUs, the same bits as where they follow a product (product.h). Others than float32 and bfloat16 are
the definition's."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..ops import Activation
from .native import Activate, at, native, number
from .product import ACTIVATIONS


def silu_and_mul(x: Tensor) -> Tensor:
    out = _activated(x, "silu_and_mul")
    return ops.silu_and_mul.__wrapped__(x) if out is None else out


def gelu_tanh(x: Tensor) -> Tensor:
    out = _activated(x, "gelu_tanh")
    return ops.gelu_tanh.__wrapped__(x) if out is None else out


def gelu(x: Tensor) -> Tensor:
    out = _activated(x, "gelu")
    return ops.gelu.__wrapped__(x) if out is None else out


def _activated(x: Tensor, name: Activation) -> Tensor | None:
    found, kind, width = native(), number(x.dtype), x.shape[-1]
    if found is None or kind is None or not x.is_contiguous() or not x.numel():
        return None
    outs = width // 2 if name == "silu_and_mul" else width
    out = x.new_empty((*x.shape[:-1], outs))
    call = Activate(at(x), at(out), x.numel() // width, outs, ACTIVATIONS.index(name), kind)
    found.run("tandem_activate", call)
    return out
