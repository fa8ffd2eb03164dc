"""The norms against float64, on strided rows inside poison."""

from __future__ import annotations

import pytest
import torch
from closeness import DTYPES, assert_close, frame_is_whole, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.triton import layer_norm, layer_norm_int8, rms_norm, rms_norm_int8

SHAPES = [(1, 1), (1, 64), (3, 5 * 123), (130, 7), (2, 1000), (2, 4096)]


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    normal = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal.to(x.dtype).double() * weight.double()


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", ["rms", "layer"])
def test_norms(name: str, rows: int, width: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, weight, bias = 3 * noise(rows, width) + 0.5, noise(width, dtype=dtype, seed=1), noise(width, dtype=dtype, seed=3)
    x = framed(x.to(dtype))
    residual = framed(noise(rows, width, dtype=dtype, seed=2)) if with_residual else None
    total = x.clone() if residual is None else x + residual
    before = x.clone()
    with poisoned_memory():
        out = rms_norm(x, weight, 1e-5, residual) if name == "rms" else layer_norm(x, weight, bias, 1e-5, residual)
    if name == "rms":
        # The normal value is rounded before the product: where it lies halfway, either neighbour is right.
        assert_close(out, exact_rms_norm(total, weight, 1e-5), dtype, ulps=4 if dtype == torch.float32 else 2)
    else:
        assert_close(out, exact_layer_norm(total, weight, bias, 1e-5), dtype, ulps=4, magnitude=1)
    assert torch.equal(x, before) and frame_is_whole(x)
    if residual is not None:
        assert torch.equal(residual, total) and frame_is_whole(residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 123), (17, 80), (2, 4096)])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", ["rms", "layer"])
def test_results_in_int8(name: str, rows: int, width: int, with_residual: bool, dtype: torch.dtype) -> None:
    """Bit by bit what the norm gives, quantized."""
    x, weight, bias = noise(rows, width), noise(width, dtype=dtype, seed=1), noise(width, dtype=dtype, seed=3)
    x[:, width // 2] *= 300  # an outlier channel
    x[rows // 2] = 0
    x = framed(x.to(dtype))
    residual = framed(noise(rows, width, dtype=dtype, seed=2)) if with_residual else None
    total = None if residual is None else residual.clone()
    with poisoned_memory():
        if name == "rms":
            found, plain = rms_norm_int8(x, weight, 1e-5, residual), rms_norm(x, weight, 1e-5, total)
        else:
            found, plain = layer_norm_int8(x, weight, bias, 1e-5, residual), layer_norm(x, weight, bias, 1e-5, total)
    expected = ops.quantize_rows.__wrapped__(plain.cpu())  # type: ignore[attr-defined]
    assert torch.equal(found.values.cpu(), expected.values) and torch.equal(found.scale.cpu(), expected.scale)
    assert frame_is_whole(x)
    if residual is not None and total is not None:
        assert torch.equal(residual, total) and frame_is_whole(residual)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_normal_value_is_rounded_before_the_weight(dtype: torch.dtype) -> None:
    """As in the definition: unrounded, a third of the results would be their neighbours."""
    x, weight = noise(8, 1000, dtype=dtype), noise(1000, dtype=dtype, seed=1)
    same = rms_norm(x, weight, 1e-5) == exact_rms_norm(x, weight, 1e-5).to(dtype)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_weight_multiplies_the_unrounded_value(dtype: torch.dtype) -> None:
    x, weight = noise(8, 1000, dtype=dtype), 1 + noise(1000, seed=1) / 100
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype and (out == exact.to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions(dtype: torch.dtype) -> None:
    x, weight = noise(2, 3, 5, 33, dtype=dtype), noise(33, dtype=dtype, seed=1)
    out = rms_norm(x, weight, 1e-6)
    assert out.shape == x.shape and torch.equal(out.view(-1, 33), rms_norm(x.view(-1, 33), weight, 1e-6))


def test_statistics_are_float32() -> None:
    """In float16 the sum of squares of 1000 · 300 would be infinite."""
    ones = torch.ones_like(noise(1, 1000, dtype=torch.float16))
    assert torch.equal(rms_norm(300 * ones, ones[0], 0.0), ones)
    assert torch.equal(layer_norm(300 * ones, ones[0], ones[0], 1.0), ones)


@pytest.mark.parametrize("width", [64, 33])
def test_no_rows(width: int) -> None:
    empty, weight = noise(0, width), noise(width)
    assert rms_norm(empty, weight, 1e-6).shape == layer_norm(empty, weight, weight, 1e-6).shape == (0, width)
    for found in (rms_norm_int8(empty, weight, 1e-6), layer_norm_int8(empty, weight, weight, 1e-6)):
        assert (found.values.shape, found.scale.shape) == ((0, width), (0,))
