"""The activations against float64, on strided rows inside poison."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import DEVICE, DTYPES, assert_close, frame_is_whole, framed, noise, poisoned_memory

from tandem.kernels.triton import gelu, gelu_tanh, silu_and_mul

SHAPES = [(1, 1), (5, 123), (1, 1024), (2, 1025), (40, 3)]  # a program has 1024 elements


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), SHAPES)
def test_silu_and_mul(rows: int, inner: int, dtype: torch.dtype) -> None:
    x = framed(3 * noise(rows, 2 * inner, dtype=dtype))
    gate, up = x.double().chunk(2, -1)
    with poisoned_memory():
        out = silu_and_mul(x)
    assert_close(out, gate * gate.sigmoid() * up, dtype, ulps=8 if dtype == torch.float32 else 1)
    assert frame_is_whole(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 4, 5)], ids=str)
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = framed(3 * noise(1, math.prod(shape), dtype=dtype)).view(shape)
    wide = x.double()
    with poisoned_memory():
        found, found_tanh = gelu(x), gelu_tanh(x)
    ulps = 4 if dtype == torch.float32 else 1
    assert_close(found, wide / 2 * (1 + (wide * math.sqrt(0.5)).erf()), dtype, ulps, magnitude=1)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    assert_close(found_tanh, wide / 2 * (1 + inner.tanh()), dtype, ulps, magnitude=1)
    assert torch.equal(x.double(), wide)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: torch.dtype) -> None:
    """Where exp overflows, the value is 0 or x, not NaN."""
    x = torch.tensor([[-60000.0, -200.0, -90.0, 0.0, 90.0, 60000.0]], dtype=dtype, device=DEVICE)
    for found in (gelu(x), gelu_tanh(x), silu_and_mul(torch.cat((x, torch.ones_like(x)), -1))):
        assert torch.allclose(found, x.clamp(min=0), rtol=0, atol=1e-30)


def test_no_rows() -> None:
    assert gelu(noise(0, 8)).shape == (0, 8) and silu_and_mul(noise(0, 8)).shape == (0, 4)
