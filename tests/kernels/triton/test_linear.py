"""Matrix products against float64, and the fixed order of the deterministic ones."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from closeness import DTYPES, assert_close, exact_linear, frame_is_whole, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels.ops import Activation
from tandem.kernels.triton import linear

SHAPES = [(1, 1), (5, 123), (9, 64), (3, 1030)]  # [outs, ins]; 1030: one whole block of columns, and a part
ACTIVATIONS = [None, *get_args(Activation)]


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Terms are about 1, and a sum may fall on the other side of a rounding before the activation."""
    assert_close(found, wanted, dtype, ulps=16 if dtype == torch.float32 else 2.5, magnitude=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_linear(rows: int, outs: int, ins: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight = framed(noise(rows, ins, dtype=dtype)), noise(outs, ins, seed=1) / ins**0.5
    weight, bias = weight.to(dtype), noise(outs, dtype=dtype, seed=2) if biased else None
    for deterministic in (False, True):
        with poisoned_memory():
            found = linear(x, weight, bias, deterministic=deterministic)
        check(found, exact_linear(x, weight, bias, None), dtype)
    assert frame_is_whole(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_activations(rows: int, activation: Activation | None, biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = noise(rows, 48), noise(2 * 7, 48, seed=1) / 48**0.5, noise(2 * 7, seed=2)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else None
    with poisoned_memory():
        found = linear(x, weight, bias, activation)
    check(found, exact_linear(x, weight, bias, activation), dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy under the interpreter; infinity is right
def test_large_and_negative_gates() -> None:
    x, weight = noise(1, 1).fill_(1), noise(4, 1)
    weight[:, 0] = torch.tensor([-200.0, 200.0, 2.0, 3.0])
    assert linear(x, weight, None, "silu_and_mul").tolist() == [[0.0, 600.0]]
    for name in ("gelu_tanh", "gelu"):
        assert linear(x, weight, None, name)[0, :2].tolist() == [0.0, 200.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), [(70, 130), (3, 1000)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_deterministic_rows_do_not_depend_on_others(outs: int, ins: int, biased: bool, dtype: torch.dtype) -> None:
    """Bit for bit, at every place of a block of rows, alone and among others."""
    x, weight = noise(67, ins, dtype=dtype), (noise(outs, ins, seed=1) / ins**0.5).to(dtype)
    bias = noise(outs, dtype=dtype, seed=2) if biased else None
    whole = linear(x, weight, bias, deterministic=True)
    for part in (slice(0, 1), slice(66, 67), slice(5, 22), slice(1, 67)):
        assert torch.equal(linear(x[part], weight, bias, deterministic=True), whole[part]), part


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_rows(deterministic: bool) -> None:
    assert linear(noise(0, 8), noise(3, 8), None, None, deterministic).shape == (0, 3)


def test_sums_are_float32() -> None:
    """Sums in float32: ones of 4096 columns would stop at 2048 in float16, 256 in bfloat16."""
    x, weight = noise(2, 4096, dtype=torch.float16), noise(1, 4096, dtype=torch.float16)
    x, weight = torch.ones_like(x), torch.ones_like(weight)
    assert linear(x, weight).tolist() == linear(x, weight, deterministic=True).tolist() == [[4096.0]] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("outs", "ins"), [(4096, 4096), (2304, 768), (32000, 768), (1, 4096)])
def test_real_shapes(outs: int, ins: int, dtype: torch.dtype) -> None:
    """On a device instructions could depend on T: they must not."""
    x, weight = noise(1030, ins, dtype=dtype), (noise(outs, ins, seed=1) / ins**0.5).to(dtype)
    whole = linear(x, weight, deterministic=True)
    check(whole, exact_linear(x, weight, None, None), dtype)
    for rows in (1, 2, 4, 5, 16, 63, 64, 65, 256):
        assert torch.equal(linear(x[:rows], weight, deterministic=True), whole[:rows])
        check(linear(x[:rows], weight), exact_linear(x[:rows], weight, None, None), dtype)
