"""K and V in pages, bit by bit as the definition puts them, with every other slot untouched."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, DTYPES, framed, noise
from paged import empty_cache, same_cache
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.triton import write_kv

PAGES, SIZE = 6, 5


def shuffled(rows: int, seed: int = 1) -> Tensor:
    return torch.randperm(PAGES * SIZE, generator=torch.Generator().manual_seed(seed))[:rows].to(DEVICE)


@pytest.mark.parametrize("stored", [*DTYPES, pytest.param(torch.int8, id="int8")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "kv_heads", "width"), [(1, 1, 64), (23, 3, 80), (7, 12, 64), (5, 33, 24), (2, 2, 256)]
)
def test_write_kv(rows: int, kv_heads: int, width: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    """k and v are parts of one product's rows, as a model's are. A program has 1024 elements."""
    qkv = framed(noise(rows, 3 * kv_heads * width, dtype=dtype)).unflatten(1, (kv_heads, 3, width))
    k, v = qkv[:, :, 1], qkv[:, :, 2]
    slots = shuffled(rows)
    found, expected = (empty_cache(PAGES, kv_heads, SIZE, width, stored) for _ in range(2))
    write_kv(k, v, slots, found)
    ops.write_kv.__wrapped__(k, v, slots, expected)
    same_cache(found, expected)


def test_int8_rounds_as_the_definition() -> None:
    """Halves to even, the largest to ±127, zeros and values under the smallest scale to what they are."""
    k = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5], device=DEVICE).repeat(4, 1)
    k *= torch.tensor([1.0, 0.0, 2.0**-22, 1000.0], device=DEVICE).unsqueeze(-1)
    k[2, 1:4] = torch.tensor([5e-5, 1e-4, 9e-5])
    values = k.unsqueeze(1)  # [4, 1, 8]
    found, expected = (empty_cache(1, 1, 4, 8, torch.int8) for _ in range(2))
    slots = torch.tensor([2, 0, 3, 1], device=DEVICE)
    write_kv(values, -values, slots, found)
    ops.write_kv.__wrapped__(values, -values, slots, expected)
    same_cache(found, expected)
    assert found.k[0, 0, 2].tolist() == [127, 0, 2, 2, 0, -2, -126, 126]
    assert found.k[0, 0, 0].tolist() == [0] * 8


@pytest.mark.parametrize("stored", [torch.float16, torch.int8], ids=str)
def test_pages_of_a_pool(stored: torch.dtype) -> None:
    """Pages that do not follow each other: every second one of a pool."""
    pool = empty_cache(2 * PAGES, 2, SIZE, 16, stored)
    layer = ops.KVLayer(*(None if part is None else part[::2] for part in pool))
    expected = empty_cache(PAGES, 2, SIZE, 16, stored)
    k, v, slots = noise(9, 2, 16, dtype=torch.float16), noise(9, 2, 16, dtype=torch.float16, seed=1), shuffled(9)
    write_kv(k, v, slots, layer)
    ops.write_kv.__wrapped__(k, v, slots, expected)
    same_cache(layer, expected)
    same_cache(
        ops.KVLayer(*(None if part is None else part[1::2] for part in pool)), empty_cache(PAGES, 2, SIZE, 16, stored)
    )


def test_no_rows() -> None:
    cache = empty_cache(1, 2, 4, 8, torch.float16)
    none = noise(0, 2, 8, dtype=torch.float16)
    write_kv(none, none, torch.empty(0, dtype=torch.int64, device=DEVICE), cache)
    same_cache(cache, empty_cache(1, 2, 4, 8, torch.float16))


def test_offsets_are_64_bits() -> None:
    """The third of three pages begins behind 2³¹ elements. Nothing between them is touched, so it takes no memory."""
    pages = torch.empty(2**31 + 4096, dtype=torch.int8, device=DEVICE).as_strided(
        (3, 1, 2, 16), (2**30 + 64, 32, 16, 1)
    )
    scales = torch.zeros(3, 1, 2, dtype=torch.float16, device=DEVICE)
    k, slot = noise(1, 1, 16), torch.tensor([5], device=DEVICE)
    write_kv(k, k, slot, ops.KVLayer(pages, pages, scales, scales))
    expected = empty_cache(3, 1, 2, 16, torch.int8)
    ops.write_kv.__wrapped__(k, k, slot, expected)
    assert torch.equal(pages[2, 0, 1], expected.k[2, 0, 1])
