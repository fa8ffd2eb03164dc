"""Products with int8 weights against float64, and those of int8 with int8 against the definition, bit by bit."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from closeness import DEVICE, DTYPES, assert_close, exact_linear, frame_is_whole, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.ops import Activation, Int8
from tandem.kernels.triton import linear_int8, linear_w8a8, quantize_rows
from tandem.kernels.triton.linear_tile import Tile, in_tiles

MODULE: Any = import_module("tandem.kernels.triton.linear_int8")
SHAPES = [(1, 1), (5, 123), (34, 80), (6, 1030), (70, 33)]  # [outs, ins]: no multiple of a tile among them
ACTIVATIONS = [None, *get_args(Activation)]
TILES = sorted({(size, tile) for arch in MODULE.TILES.values() for size in arch for tile in arch[size].values()})


def matrix(outs: int, ins: int, outlier: float = 50) -> Int8:
    """About 1 / √D in size, with a channel whose weights are larger by this factor and an output without any."""
    weight = noise(outs, ins, seed=1) / ins**0.5
    weight[:, ins // 2] *= outlier
    weight[outs // 2] *= outs == 1
    values, scale = ops.quantize_rows.__wrapped__(weight.cpu())  # type: ignore[attr-defined]
    return Int8(values.to(DEVICE), scale.to(DEVICE))


def exact(x: Tensor, weight: Int8, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    return exact_linear(x, weight.values.double() * weight.scale.double().unsqueeze(-1), bias, activation)


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype, magnitude: float = 8) -> None:
    """Terms of the channel that stands out are that large; a sum may fall on the other side of a rounding."""
    assert_close(found, wanted, dtype, ulps=16 if dtype == torch.float32 else 2.5, magnitude=magnitude)


# x in floats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 65])
def test_linear_int8(rows: int, outs: int, ins: int, dtype: torch.dtype) -> None:
    x, weight, bias = framed(noise(rows, ins, dtype=dtype)), matrix(outs, ins), noise(outs, dtype=dtype, seed=2)
    for given, deterministic in ((bias, False), (None, True)):
        with poisoned_memory():
            found = linear_int8(x, weight, given, deterministic=deterministic)
        check(found, exact(x, weight, given), dtype)
    assert frame_is_whole(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2, 5, 65])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_activations(rows: int, activation: Activation | None, biased: bool, dtype: torch.dtype) -> None:
    x, weight = noise(rows, 48, dtype=dtype), matrix(2 * 7, 48, outlier=1)
    bias = noise(2 * 7, dtype=dtype, seed=2) if biased else None
    for deterministic in (False, True):
        with poisoned_memory():
            found = linear_int8(x, weight, bias, activation, deterministic)
        check(found, exact(x, weight, bias, activation), dtype, magnitude=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 30])
def test_every_value_is_what_it_stands_for(rows: int, dtype: torch.dtype) -> None:
    """All 256 in each column, of which a row of x picks one out: -128, too, which others' checkpoints have."""
    output, column = torch.arange(256).unsqueeze(-1), torch.arange(33)
    values = ((output + 37 * column) % 256 - 128).to(torch.int8).to(DEVICE)
    weight = Int8(values, 2.0 ** -(torch.arange(256, device=DEVICE) % 8).float())
    picked = torch.arange(rows, device=DEVICE) % 33
    x = torch.nn.functional.one_hot(picked, 33).to(dtype)
    wanted = (values[:, picked].T.double() * weight.scale.double()).to(dtype)
    for deterministic in (False, True):
        assert torch.equal(linear_int8(x, weight, deterministic=deterministic), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
@pytest.mark.parametrize("rows", [3, 20])
def test_divided_columns(
    rows: int, activation: Activation | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four parts, the last of which is shorter, as a matrix with few outputs and many columns is."""
    monkeypatch.setattr(MODULE, "LEAST", 256)
    x, weight, bias = noise(rows, 1030, dtype=dtype), matrix(70, 1030, 1), noise(70, dtype=dtype, seed=2)
    assert MODULE._sizes(x, weight, rows)[1] == 4
    with poisoned_memory():
        found = linear_int8(x, weight, bias, activation)
    check(found, exact(x, weight, bias, activation), dtype, magnitude=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_many_rows(biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """W in x's dtype, 32 outputs at a time; its values are rounded there, too."""
    monkeypatch.setattr(MODULE, "ALIGNED", 16)
    monkeypatch.setattr(MODULE, "LARGEST", 47 * 123)
    x, weight = framed(noise(MODULE.MANY, 123, dtype=dtype)), matrix(70, 123)
    bias = noise(70, dtype=dtype, seed=2) if biased else None
    with poisoned_memory():
        found = linear_int8(x, weight, bias)
    rounded = (weight.values.float() * weight.scale.unsqueeze(-1)).to(dtype)
    wanted = exact(x, Int8(rounded, torch.ones_like(weight.scale)), bias)
    check(found, wanted, dtype, magnitude=32)
    assert frame_is_whole(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), [(70, 130), (3, 1000)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_deterministic_rows_do_not_depend_on_others(
    outs: int, ins: int, activation: Activation | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, at every place of a block of rows, alone and among others, with divided columns, too."""
    monkeypatch.setattr(MODULE, "LEAST", 256)
    x, weight, bias = noise(67, ins, dtype=dtype), matrix(outs, ins), noise(outs, dtype=dtype, seed=2)
    whole = linear_int8(x, weight, bias, activation, deterministic=True)
    for part in (slice(0, 1), slice(66, 67), slice(5, 22), slice(1, 67)):
        assert torch.equal(linear_int8(x[part], weight, bias, activation, deterministic=True), whole[part]), part


def test_sums_are_float32() -> None:
    """127 times ones of 4096 columns would be infinite in float16."""
    x = torch.ones(3, 4096, dtype=torch.float16, device=DEVICE)
    weight = Int8(torch.full((1, 4096), 127, dtype=torch.int8, device=DEVICE), torch.full((1,), 2.0**-7, device=DEVICE))
    for rows in (1, 3):
        for deterministic in (False, True):
            assert linear_int8(x[:rows], weight, deterministic=deterministic).tolist() == [[4064.0]] * rows


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_rows(deterministic: bool) -> None:
    weight = matrix(4, 8)
    assert linear_int8(noise(0, 8), weight, None, "silu_and_mul", deterministic).shape == (0, 2)
    assert linear_w8a8(*quantize_rows(noise(0, 8)), weight, None, None, torch.float16).shape == (0, 4)


# x in int8 ----------------------------------------------------------------------------------------------------------


def defined(x: Int8, weight: Int8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """By the CPU, which adds and multiplies in the order of the definition and fuses nothing."""
    here = [None if part is None else part.cpu() for part in (*x, *weight, bias)]
    found = ops.linear_w8a8.__wrapped__(  # type: ignore[attr-defined]
        here[0], here[1], Int8(here[2], here[3]), here[4], None, dtype
    )
    return found.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 66])
def test_linear_w8a8(rows: int, outs: int, ins: int, dtype: torch.dtype) -> None:
    x = noise(rows, ins)
    x[:, ins // 3] *= 100  # an outlier channel
    x[rows // 2] *= rows == 1  # a row of zeros
    given, weight = quantize_rows(x), matrix(outs, ins)
    bias = noise(outs, dtype=dtype, seed=2) if rows % 2 else None
    with poisoned_memory():
        found = linear_w8a8(*given, weight, bias, None, dtype)
    assert found.dtype == dtype and torch.equal(found, defined(given, weight, bias, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_int8(activation: Activation | None) -> None:
    given, weight, bias = quantize_rows(noise(5, 48)), matrix(14, 48), noise(14, seed=2)
    plain = linear_w8a8(*given, weight, bias, None, torch.float16)
    with poisoned_memory():
        found = linear_w8a8(*given, weight, bias, activation, torch.float16)
    assert torch.equal(found, ops.activate(plain, activation))


@pytest.mark.parametrize(("size", "tile"), TILES, ids=str)
def test_tiles(size: int, tile: Tile) -> None:
    """Every one that a device may choose, over its edges in rows, outputs and columns; int8 whole and in two parts."""
    rows, outs, ins = tile.rows + 1, tile.out + 2, tile.columns + 33
    weight, bias = matrix(outs, ins), noise(outs, seed=2)
    if size > 1:
        x = noise(rows, ins, dtype={2: torch.float16, 4: torch.float32}[size])
        with poisoned_memory():
            found = in_tiles(x, weight.values, bias.to(x.dtype), tile, scale=weight.scale)
        check(found, exact(x, weight, bias.to(x.dtype)), x.dtype)
        return
    given = quantize_rows(noise(rows, ins))
    wanted = defined(given, weight, bias, torch.float32)
    for parts in (1, 2):
        with poisoned_memory():
            found = in_tiles(
                given.values,
                weight.values,
                bias,
                tile,
                parts=parts,
                x_scale=given.scale,
                scale=weight.scale,
                dtype=torch.float32,
            )
        assert torch.equal(found, wanted), f"{parts} parts"


def test_the_largest_values_add_up() -> None:
    """Above 2²⁴, where float32 sums would round, and in both signs."""
    values = torch.full((2, 2001), 127, dtype=torch.int8, device=DEVICE)
    values[1, :-1] = -127
    ones = torch.ones(2, device=DEVICE)
    found = linear_w8a8(values, ones, Int8(values, ones), None, None, torch.float32)
    wanted = values.cpu().long() @ values.cpu().long().T
    assert torch.equal(found.cpu(), wanted.float()) and int(wanted.abs().max()) > 2**24


# On a device --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outs", "ins"), [(4096, 4096), (4096, 14336), (2304, 768), (32000, 768), (1, 4096)])
def test_real_shapes(outs: int, ins: int, dtype: torch.dtype) -> None:
    """Every regime; and bits that could depend on T, but must not."""
    weight = quantize_rows(noise(outs, ins, seed=1) / ins**0.5)
    x = noise(1030, ins, dtype=dtype)
    whole, given = linear_int8(x, weight, deterministic=True), quantize_rows(x)
    check(whole, exact(x, weight, None), dtype, magnitude=1)
    exact_whole = linear_w8a8(*given, weight, None, None, dtype)
    check(exact_whole, exact(given.values.double() * given.scale.double().unsqueeze(-1), weight, None), dtype, 1)
    for rows in (1, 2, 3, 16, 17, 64, 65, 256, 600):
        assert torch.equal(linear_int8(x[:rows], weight, deterministic=True), whole[:rows])
        part = Int8(given.values[:rows], given.scale[:rows])
        assert torch.equal(linear_w8a8(*part, weight, None, None, dtype), exact_whole[:rows])
        check(linear_int8(x[:rows], weight), exact(x[:rows], weight, None), dtype, magnitude=1)
