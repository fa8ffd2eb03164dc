"""Norms, rotation and the write of K and V on CPUs.

Each takes float32 and bfloat16 throughout, into pages of int8, too, and leaves everything else to the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import KVLayer
from .native import Norm, Rotary, Write, at, native, number, pages_of


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    out = _norm(x, weight, None, eps, residual)
    return ops.rms_norm.__wrapped__(x, weight, eps, residual) if out is None else out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    out = _norm(x, weight, bias, eps, residual)
    return ops.layer_norm.__wrapped__(x, weight, bias, eps, residual) if out is None else out


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor | None:
    found, kind = native(), number(x.dtype)
    if found is None or kind is None or weight.dtype != x.dtype or not x.is_contiguous():
        return None
    if residual is not None and not residual.is_contiguous():
        return None
    size = x.shape[-1]
    out = torch.empty_like(x)
    call = Norm(at(x), at(residual), at(weight), at(bias), at(out), x.numel() // size, size, kind, eps)
    found.run("tandem_norm", call)
    return out


def qk_norm_rotary_and_write_kv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    slots: Tensor,
    cache: KVLayer,
) -> Tensor:
    found, kind, pages = native(), number(qkv.dtype), pages_of(cache, qkv.dtype)
    norms = all(norm is None or norm.dtype == qkv.dtype for norm in (q_norm, k_norm))
    if found is None or kind is None or pages is None or not norms:
        return ops.qk_norm_rotary_and_write_kv.__wrapped__(
            qkv, q_norm, k_norm, eps, positions, cos, sin, interleaved, slots, cache
        )
    assert (q_norm is None) == (k_norm is None), "both norms or none"
    assert qkv.is_contiguous() and positions.is_contiguous() and slots.is_contiguous()
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    heads = qkv.shape[-1] // size - 2 * kv_heads
    q = torch.empty(qkv.shape[0], heads, size, dtype=qkv.dtype)
    tensors = (qkv, q_norm, k_norm, positions, cos, sin, slots, q)
    shape = (qkv.shape[0], heads, cos.shape[-1], int(interleaved), kind)
    found.run("tandem_rotary", Rotary(*map(at, tensors), pages, *shape, eps))
    return q


def write_kv(k: Tensor, v: Tensor, slots: Tensor, cache: KVLayer) -> None:
    found, kind, pages = native(), number(k.dtype), pages_of(cache, k.dtype)
    rows = all(part.dtype == k.dtype and part.stride()[1:] == (part.shape[2], 1) for part in (k, v))
    if found is None or kind is None or pages is None or not rows:
        ops.write_kv.__wrapped__(k, v, slots, cache)
        return
    assert slots.is_contiguous()
    steps = k.stride(0), v.stride(0)
    found.run("tandem_write", Write(at(k), at(v), at(slots), pages, len(k), *steps, kind))
