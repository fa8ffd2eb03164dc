"""Prefill rows: tiles of queries against pages, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace

import attended
import pytest
import torch
from attended import SLOPES
from closeness import DTYPES, noise, poisoned_memory
from paged import Paged, random_pages
from torch import Tensor

from tandem.kernels.triton import paged_attention

F16, INT8 = torch.float16, torch.int8
SCALE = 0.2
OPTIONS = {
    "plain": {},
    "alibi": {"alibi": SLOPES},
    "window 1": {"window": 1},
    "window 40": {"window": 40},
    "window 100": {"window": 100},
    "softcap": {"softcap": 1.5},
    "all": {"alibi": SLOPES, "window": 90, "softcap": 1.5},
}


def attend(q: Tensor, paged: Paged, **options: object) -> Tensor:
    with poisoned_memory():
        return paged_attention(q, paged.cache, paged.sequences, SCALE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, dtype: torch.dtype) -> None:
    """A prompt with a cached start, and a chunk that ends before, at and behind a tile's end."""
    paged = random_pages([(150, 47), (64, 2), (40, 40)], 2, 16, 64, dtype)
    q = noise(89, 8, 16, dtype=dtype)
    chosen = attended.on_device(OPTIONS[options])
    attended.check(attend(q, paged, **chosen), q, paged, SCALE, **chosen)


@pytest.mark.parametrize("dtype, size", [(F16, 16), (F16, 64), (F16, 24), (F16, 128), (INT8, 24), (INT8, 64)], ids=str)
def test_lengths(dtype: torch.dtype, size: int) -> None:
    """Mixed with decodes; more rows than a tile has, around the ends of tiles and pages."""
    shape = [(70, 1), (5, 1), (2, 2), (15, 15), (17, 16), (66, 65), (129, 3), (257, 90)]
    paged = random_pages(shape, 1, 16, size, dtype)
    q = noise(sum(rows for _, rows in shape), 4, 16, dtype=torch.float16)
    attended.check(attend(q, paged), q, paged, SCALE)


@pytest.mark.parametrize("heads, kv_heads, width", [(3, 3, 16), (6, 2, 40), (7, 1, 24), (20, 1, 16)])
def test_shapes(heads: int, kv_heads: int, width: int) -> None:
    paged = random_pages([(9, 1), (70, 33), (5, 5)], kv_heads, width, 32, torch.float32)
    q = noise(39, heads, width)
    attended.check(attend(q, paged), q, paged, SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_int8_pages(options: str, dtype: torch.dtype) -> None:
    paged = random_pages([(150, 20), (30, 30)], 2, 32, 64, torch.int8)
    q = noise(50, 8, 32, dtype=dtype)
    chosen = attended.on_device(OPTIONS[options])
    attended.check(attend(q, paged, **chosen), q, paged, SCALE, **chosen)


def test_many_sequences() -> None:
    """More than are looked at together, some without rows."""
    shape = [(3 + index % 5, 2) for index in range(150)]
    paged = random_pages(shape, 1, 16, 16, torch.float32)
    q = noise(300, 1, 16)
    exact = attended.exact(q, paged, SCALE)
    starts = paged.sequences.query_starts
    order = torch.tensor([*range(60), 3, *range(60, 150), 0, 1])
    inserted = torch.cat((starts[:61], starts[60:], starts[-1:], starts[-1:]))
    sequences = paged.sequences._replace(
        query_starts=inserted,
        lengths=paged.sequences.lengths[order],
        page_table=paged.sequences.page_table[order],
    )
    found = attend(q, replace(paged, sequences=sequences))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
