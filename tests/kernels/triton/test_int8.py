"""Rows in int8, bit by bit as the definition rounds them, from strided rows inside poison."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, DTYPES, frame_is_whole, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.ops import Int8
from tandem.kernels.triton import quantize_rows


def defined(x: Tensor) -> Int8:
    """By the CPU: a device divides by 127 in another way."""
    values, scale = ops.quantize_rows.__wrapped__(x.cpu())  # type: ignore[attr-defined]
    return Int8(values.to(x.device), scale.to(x.device))


def same_rows(found: Int8, expected: Int8) -> None:
    assert (found.values.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(found.values, expected.values) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 123), (17, 80), (2, 4096), (1, 11008)])
def test_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    x = noise(rows, width) * torch.logspace(-6, 4, rows).unsqueeze(-1).to(DEVICE)
    x[rows // 2, width // 3] = 900.0  # an outlier: nearly all others become 0
    x = framed(x.clamp(-6e4, 6e4).to(dtype))
    with poisoned_memory():
        found = quantize_rows(x)
    same_rows(found, defined(x))
    assert frame_is_whole(x)


def test_a_row_of_zeros_stays_zero() -> None:
    x = noise(3, 40)
    x[1] = 0
    found = quantize_rows(x)
    same_rows(found, defined(x))
    assert not found.values[1].any() and found.scale[1] == torch.finfo(torch.float32).tiny


def test_halves_go_to_even_and_the_largest_to_127() -> None:
    steps = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5, -127])
    x = (steps * torch.tensor([[1.0], [2.0**-20], [2.0**90]])).to(DEVICE)
    found = quantize_rows(x)
    assert found.values.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126, -127]] * 3
    assert found.scale.tolist() == [1.0, 2.0**-20, 2.0**90]


def test_a_scale_is_at_least_the_smallest_normal_number() -> None:
    """A row that lies under 127 of it has fewer steps."""
    x = torch.full((2, 5), 2.0**-126, device=DEVICE) * torch.tensor([[3.0], [200.0]], device=DEVICE)
    found = quantize_rows(x)
    same_rows(found, defined(x))
    assert found.values[:, 0].tolist() == [3, 127]


def test_no_rows() -> None:
    values, scale = quantize_rows(noise(0, 33))
    assert values.shape == (0, 33) and scale.shape == (0,)
