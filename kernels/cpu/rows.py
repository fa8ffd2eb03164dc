"""Norms, rotation and the write of K and V on CPUs.

Each takes float32 and bfloat16 throughout and leaves everything else to the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import KVLayer
from .native import WIDEST_HEAD, Norm, Rotary, at, native, number, page_step


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
    found, kind = native(), number(qkv.dtype)
    kv_heads, page, size = cache.k.shape[1:]
    norms = all(norm is None or norm.dtype == qkv.dtype for norm in (q_norm, k_norm))
    if found is None or kind is None or cache.k.dtype != qkv.dtype or not norms or size > WIDEST_HEAD:
        return ops.qk_norm_rotary_and_write_kv.__wrapped__(
            qkv, q_norm, k_norm, eps, positions, cos, sin, interleaved, slots, cache
        )
    assert (q_norm is None) == (k_norm is None), "both norms or none"
    assert qkv.is_contiguous() and positions.is_contiguous() and slots.is_contiguous()
    heads = qkv.shape[-1] // size - 2 * kv_heads
    q = torch.empty(qkv.shape[0], heads, size, dtype=qkv.dtype)
    tensors = (qkv, q_norm, k_norm, positions, cos, sin, slots, q, cache.k, cache.v)
    pages = (kv_heads, size, page, page_step(cache.k, cache.v))
    shape = (qkv.shape[0], heads, *pages, cos.shape[-1], int(interleaved), kind)
    found.run("tandem_rotary", Rotary(*map(at, tensors), *shape, eps))
    return q
