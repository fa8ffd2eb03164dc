"""Copies of pages, bit by bit."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, framed, noise

from tandem.kernels.triton import copy_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 41), (8, 16, 80), (4, 64, 64)], ids=str)
def test_copy_pages(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Pages of less than a program's 8 KiB, of whole ones and a part, apart from each other; a source used twice."""
    pages = framed((noise(7, torch.Size(shape).numel()) * 50).to(dtype)).view(7, *shape)
    expected = pages.clone()
    moves = torch.tensor([[4, 1], [4, 5], [0, 2]], device=DEVICE)
    expected[moves[:, 1]] = expected[moves[:, 0]]
    whole = pages._base
    assert whole is not None
    around = whole.clone()
    copy_pages(pages, moves[:, 0], moves[:, 1])
    assert torch.equal(pages, expected)
    around[1:-1, :-3] = expected.flatten(1)
    assert torch.equal(whole.nan_to_num(nan=77), around.nan_to_num(nan=77))


def test_no_copies() -> None:
    pages, none = noise(2, 8), torch.empty(0, dtype=torch.int64, device=DEVICE)
    before = pages.clone()
    copy_pages(pages, none, none)
    assert torch.equal(pages, before)


def test_offsets_are_64_bits() -> None:
    """The third of three pages begins behind 2³¹ elements. Nothing between them is touched, so it takes no memory."""
    pages = torch.empty(2**31 + 4096, dtype=torch.int8, device=DEVICE).as_strided((3, 100), (2**30 + 64, 1))
    pages[0], pages[2] = 1, 2
    copy_pages(pages, torch.tensor([0], device=DEVICE), torch.tensor([2], device=DEVICE))
    assert (pages[2] == 1).all()
