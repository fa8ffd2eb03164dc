"""Rows in int8 and products with them against what they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.ops import Int8, PackedInt8

SHAPES = [(1, 1, 1), (3, 7, 5), (5, 123, 17), (33, 64, 40)]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meant(rows: Int8) -> Tensor:
    return rows.values.double() * rows.scale.double().unsqueeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_at_most_half_a_step_off(dtype: torch.dtype) -> None:
    x = noise(17, 123, dtype=dtype)
    x[3], x[5, 7] = 0, 900.0  # a row of zeros, an outlier
    rows = ops.quantize_rows(x)
    assert rows.values.dtype == torch.int8 and int(rows.values.abs().max()) == 127
    assert ((meant(rows) - x.double()).abs() <= rows.scale.double().unsqueeze(-1) * 0.5001).all()
    assert not rows.values[3].any() and rows.scale[3] > 0


@pytest.mark.parametrize(("rows", "ins", "outs"), SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_products(rows: int, ins: int, outs: int, activation: ops.Activation | None) -> None:
    x, bias = noise(rows, ins), noise(outs, seed=2)
    weight = ops.quantize_rows(noise(outs, ins, seed=1))
    exact = ops.activate(x.double() @ meant(weight).T + bias.double(), activation)
    torch.testing.assert_close(ops.linear_int8(x, weight, bias, activation).double(), exact, rtol=1e-5, atol=1e-5)
    given = ops.quantize_rows(x)
    exact = ops.activate(meant(given) @ meant(weight).T + bias.double(), activation)
    found = ops.linear_w8a8(*given, weight, bias, activation, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 4])
def test_what_is_packed_by_hand_unpacks(depth: int) -> None:
    outs, ins = 19, 10
    weight = ops.quantize_rows(noise(outs, ins))
    data = torch.zeros(2, 12 // depth, ops.PANEL, depth, dtype=torch.int8)
    for out in range(outs):
        for column in range(ins):
            data[out // ops.PANEL, column // depth, out % ops.PANEL, column % depth] = weight.values[out, column]
    found = PackedInt8(data, torch.cat((weight.scale, torch.zeros(13))), None, outs, ins).unpack()
    assert torch.equal(found.values, weight.values) and torch.equal(found.scale, weight.scale)
