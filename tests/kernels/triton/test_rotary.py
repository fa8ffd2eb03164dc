"""Norms, rotation and page writes in one kernel: against float64, and its pages against the definition's."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, DTYPES, assert_close, frame_is_whole, framed, noise, poisoned_memory
from paged import empty_cache, same_cache
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.triton import qk_norm_rotary_and_write_kv

PAGES, SIZE, CONTEXT, EPS = 5, 4, 32, 1e-6


def exact(qkv: Tensor, kv_heads: int, norms: tuple[Tensor, Tensor] | None, angles: Tensor, interleaved: bool) -> Tensor:
    """q and k [T, N + K, H] in float64; angles [T, R / 2]."""
    turned = qkv.double()[:, : qkv.shape[1] - kv_heads].clone()
    if norms is not None:
        turned /= (turned.square().mean(-1, keepdim=True) + EPS).sqrt()
        turned[:, :-kv_heads] *= norms[0].double()
        turned[:, -kv_heads:] *= norms[1].double()
    half = angles.shape[1]
    a, b = (
        (turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2])
        if interleaved
        else (turned[..., :half], turned[..., half : 2 * half])
    )
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = a * cos - b * sin, b * cos + a * sin
    a.copy_(first)
    b.copy_(second)
    return turned


# queries, kv heads, head size, rotated: GQA and MHA, whole and partial rotation, sizes that are no power of two.
SHAPES = [
    (6, 2, 16, 16),
    (32, 8, 128, 128),
    (3, 3, 64, 16),
    (5, 1, 80, 32),
    (4, 2, 24, 24),
    (2, 1, 96, 92),
    (1, 1, 2, 2),
]


@pytest.mark.parametrize("stored", ["same", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary(
    shape: tuple[int, int, int, int], with_norms: bool, interleaved: bool, dtype: torch.dtype, stored: str
) -> None:
    queries, kv_heads, width, rotated = shape
    rows = 7 if width < 96 else 2
    qkv = framed(noise(rows, (queries + 2 * kv_heads) * width, dtype=dtype))
    before = qkv.clone()
    norms = (noise(width, dtype=dtype, seed=1), noise(width, dtype=dtype, seed=2)) if with_norms else None
    positions = torch.tensor([0, 31, 1, 2, 9, 4, 30], device=DEVICE)[:rows]
    slots = torch.tensor([3, 14, 0, 7, 19, 9, 11], device=DEVICE)[:rows]
    angles = torch.outer(torch.arange(CONTEXT), 0.7 ** torch.arange(rotated // 2)).to(DEVICE)
    kind = torch.int8 if stored == "int8" else dtype
    found, expected = (empty_cache(PAGES, kv_heads, SIZE, width, kind) for _ in range(2))
    arguments = (
        *(norms or (None, None)),
        EPS,
        positions,
        framed(angles.cos(), 0),
        framed(angles.sin(), 0),
        interleaved,
        slots,
    )
    with poisoned_memory():
        q = qk_norm_rotary_and_write_kv(qkv, *arguments, found)
    assert torch.equal(qkv, before) and frame_is_whole(qkv)
    turned = exact(qkv.unflatten(1, (-1, width)), kv_heads, norms, angles[positions].double(), interleaved)
    ulps = 8 if dtype == torch.float32 else 1
    assert_close(q, turned[:, :queries], dtype, ulps, magnitude=1)
    ops.qk_norm_rotary_and_write_kv.__wrapped__(qkv, *arguments, expected)
    page, offset = slots // SIZE, slots % SIZE
    if stored == "same":
        assert_close(found.k[page, :, offset], turned[:, queries:], dtype, ulps, magnitude=1)
        expected.k[page, :, offset] = found.k[page, :, offset]  # the rest is compared bit by bit
    else:
        assert found.k_scale is not None and expected.k_scale is not None
        scale = found.k_scale[page, :, offset]
        assert_close(scale, expected.k_scale[page, :, offset].double(), torch.float16)
        error = (found.k[page, :, offset].double() * scale.double().unsqueeze(-1) - turned[:, queries:]).abs()
        assert (error <= (0.51 + 127 * torch.finfo(dtype).eps) * scale.unsqueeze(-1)).all()
        expected.k[page, :, offset], expected.k_scale[page, :, offset] = found.k[page, :, offset], scale
    same_cache(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the rotation that is not stored
def test_v_may_be_infinite() -> None:
    """v is not rotated: not even by zero."""
    qkv = noise(1, 3 * 8)
    qkv[0, 16:] = torch.inf
    cache = empty_cache(1, 1, 1, 8, torch.float32)
    one = torch.ones(1, 4, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    qk_norm_rotary_and_write_kv(qkv, None, None, EPS, zero, one, one, False, zero, cache)
    assert cache.v.isinf().all() and cache.k.isfinite().all()


def test_padding_reads_no_angle_before_the_table() -> None:
    """A padding row of a recorded step is at position -1, in a slot that nobody reads."""
    cache, table = empty_cache(1, 1, 2, 8, torch.float32), noise(4, 4)
    table[0] = torch.nan
    at = torch.tensor([-1, 0], device=DEVICE)
    q = qk_norm_rotary_and_write_kv(noise(2, 24), None, None, EPS, at, table[1:], table[1:], False, at + 1, cache)
    assert q.isfinite().all() and cache.k.isfinite().all()


def test_no_rows() -> None:
    cache, none = empty_cache(1, 1, 1, 8, torch.float32), torch.empty(0, dtype=torch.int64, device=DEVICE)
    table = noise(3, 4)
    assert qk_norm_rotary_and_write_kv(noise(0, 32), None, None, EPS, none, table, table, False, none, cache).shape == (
        0,
        2,
        8,
    )
