"""Matrix products with int8 weights, by rows in floats or in int8.

    y = round(x Wᵀ · scale + b),  then the activation of y, rounded again;  x in int8: times its rows' scales, too

`_rows_kernel` (x in floats, 1 or 2 rows): a program multiplies BLOCK_OUT rows of W with every row of x in float32 and
adds up the columns at the end; those of one 16-byte load of W are added up within a thread. W comes through shared
memory, AHEAD blocks at a time on their way. On sm_90 a weight costs about 5 instructions for one row and 8 for two, of
which 7.5 fit while it arrives at 4.3 TB/s; 4 rows would cost 14.

Tiles (linear_tile.py) pad rows to 16, where a weight costs 4 to 5 instructions, to 64 or to more. A matrix that has too
few blocks of outputs for all processors is divided along its columns. Deterministic mode has one tile for all T; x in
int8 has the same bits in all tiles.

From MANY rows of floats on it costs less to write W once as round(values · scale), LARGEST elements at a time, and to
leave the product to cuBLAS than to convert W in every tile: 4 D O bytes more.

Letters: T rows, D = ins, O = outs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from ..ops import Activation, Int8
from .activation import activated
from .int8 import widen
from .launch import options, pick, warps
from .linear import Strip
from .linear_tile import Tile, finished, in_tiles

MOST_ROWS = 2  # of `_rows_kernel`
# By rows, filled up to a power of two: 24 and 12 KiB of W on the way to a program, of which 7 and 9 are resident.
STRIPS: Mapping[int, Strip] = MappingProxyType({1: Strip(8, 1024, 2), 2: Strip(4, 1024, 2), 4: Strip(2, 1024, 2)})
AHEAD = 4
RUN = 16  # columns of W in one load

# By architecture and bytes of an element of x: tiles by the rows up to which they are taken, the last one beyond, too.
# 96 KiB of shared memory at most before sm_90, as compute capability 8.9 has no more for one program.
TILES: Mapping[int, Mapping[int, Mapping[int, Tile]]] = MappingProxyType(
    {
        80: {
            1: {16: Tile(16, 64, 256, 4, 4), 64: Tile(64, 64, 256, 4, 3), 128: Tile(128, 128, 128, 8, 3)},
            2: {16: Tile(16, 64, 256, 4, 4), 64: Tile(64, 128, 64, 8, 4), 128: Tile(128, 128, 64, 8, 4)},
            4: {32: Tile(32, 64, 32, 8, 3)},
        },
        90: {
            1: {16: Tile(16, 64, 256, 4, 4), 64: Tile(64, 128, 128, 8, 4), 512: Tile(128, 128, 128, 8, 4)}
            | {1024: Tile(128, 256, 128, 8, 3)},
            2: {16: Tile(16, 64, 256, 4, 4), 64: Tile(64, 128, 128, 8, 4), 128: Tile(128, 128, 64, 8, 4)},
            4: {32: Tile(32, 64, 32, 8, 3)},
        },
    }
)
FIXED = 64  # rows for whose tile deterministic mode takes any T
FEW = 64  # rows up to which the activation is computed in the tile
# Parts of a matrix: as many as keep the tiles within PROGRAMS, but of LEAST columns or more.
PROGRAMS = 132
LEAST = 1024

MANY = 512
LARGEST = 1 << 25  # elements, 64 MiB in 16 bits
ALIGNED = 256  # outputs of a product of cuBLAS, or a multiple
BLOCK = 1024  # elements of a program of `_dequantize_kernel`


@triton.jit
def _dots(x, w, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    """x [ROWS, 1, columns] float32 times w [1, BLOCK_OUT, columns] int8, summed over runs of columns."""
    return tl.sum(tl.reshape(x * widen(w, tl.float32), [ROWS, BLOCK_OUT, RUNS, RUN]), 3)


@triton.jit
def _rows_kernel(
    x,
    values,
    scale,
    bias,
    out,
    rows,
    outs,
    ins,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`outs` counts the results: with silu_and_mul W has twice as many rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_OUT
    runs: tl.constexpr = BLOCK // RUN
    gated: tl.constexpr = ACTIVATION == "silu_and_mul"
    row = tl.arange(0, ROWS)[:, None, None]
    output = tl.arange(0, BLOCK_OUT)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    live = first + output < outs
    x_place = x + row * x_stride + column
    place = values + (first + output) * ins + column
    up_place = values + (first + outs + output) * ins + column
    total = tl.zeros([ROWS, BLOCK_OUT, runs], tl.float32)
    up = tl.zeros([ROWS, BLOCK_OUT, runs], tl.float32)
    for start in tl.range(0, ins, BLOCK, num_stages=AHEAD):
        inside = start + column < ins
        value = tl.load(x_place + start, mask=(row < rows) & inside, other=0.0, cache_modifier=".ca").to(tl.float32)
        w = tl.load(place + start, mask=live & inside, other=0, eviction_policy="evict_first")
        total += _dots(value, w, ROWS, BLOCK_OUT, runs, RUN)
        if gated:
            w = tl.load(up_place + start, mask=live & inside, other=0, eviction_policy="evict_first")
            up += _dots(value, w, ROWS, BLOCK_OUT, runs, RUN)
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    output = first + tl.arange(0, BLOCK_OUT)[None, :]
    live = output < outs
    y = finished(tl.sum(total, 2), None, scale, bias, output, live, out.dtype.element_ty)
    if ACTIVATION is not None:
        y = activated(y, ACTIVATION)
    if gated:
        y *= finished(tl.sum(up, 2), None, scale, bias, outs + output, live, out.dtype.element_ty)
    tl.store(out + row * outs + output, y.to(out.dtype.element_ty), mask=(row < rows) & live)


@triton.jit
def _dequantize_kernel(values, scale, out, ins, BLOCK: tl.constexpr):
    output = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(values + output * ins + column, mask=column < ins, other=0, eviction_policy="evict_first")
    y = widen(w, tl.float32) * tl.load(scale + output)
    tl.store(out + output * ins + column, y.to(out.dtype.element_ty), mask=column < ins)


def linear_int8(
    x: Tensor,
    weight: Int8,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`ops.linear_int8`. x [T, D] may have any stride between rows, none within; the matrix is contiguous."""
    _check(x, weight, bias)
    assert x.is_floating_point() and (bias is None or bias.dtype == x.dtype)
    rows = len(x)
    if not deterministic and 0 < rows <= MOST_ROWS:
        return _few_rows(x, weight, bias, activation)
    if not deterministic and rows >= MANY:
        return ops.activate(_dequantized(x, weight, bias), activation)
    tile, parts = _sizes(x, weight, FIXED if deterministic else rows)
    within = activation if tile.rows <= FEW else None
    y = in_tiles(x, weight.values, bias, tile, parts=parts, activation=within, scale=weight.scale)
    return y if within else ops.activate(y, activation)


def linear_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8,
    bias: Tensor | None,
    activation: Activation | None,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.linear_w8a8`. x [T, D] may have any stride between rows, none within; the rest is contiguous."""
    _check(x, weight, bias)
    assert x.dtype == torch.int8 and x_scale.shape == (len(x),) and x_scale.is_contiguous()
    tile, parts = _sizes(x, weight, len(x))
    y = in_tiles(x, weight.values, bias, tile, parts=parts, x_scale=x_scale, scale=weight.scale, dtype=dtype)
    return ops.activate(y, activation)


def _check(x: Tensor, weight: Int8, bias: Tensor | None) -> None:
    values, scale = weight
    outs, ins = values.shape
    assert values.dtype == torch.int8 and values.is_contiguous() and x.shape[1:] == (ins,)
    assert scale.shape == (outs,) and scale.dtype == torch.float32 and scale.is_contiguous()
    assert bias is None or (bias.shape == (outs,) and bias.is_contiguous())
    assert x.stride(1) == 1 or ins == 1


def _sizes(x: Tensor, weight: Int8, rows: int) -> tuple[Tile, int]:
    """The tile for `rows` rows and the parts of the matrix, which depend on nothing else but its shape."""
    tiles = pick(TILES, x.device)[x.element_size()]
    tile = tiles[min((most for most in tiles if rows <= most), default=max(tiles))]
    return tile, parts_of(weight, tile, rows)


def parts_of(weight: Int8, tile: Tile, rows: int) -> int:
    """Into how many parts the columns are divided, so that there is work for all processors."""
    outs, ins = weight.values.shape
    programs = triton.cdiv(max(rows, 1), tile.rows) * triton.cdiv(outs, tile.out)
    return max(1, min(PROGRAMS // programs, ins // LEAST))


def _few_rows(x: Tensor, weight: Int8, bias: Tensor | None, activation: Activation | None) -> Tensor:
    (rows, ins), outs = x.shape, len(weight.scale)
    gated = activation == "silu_and_mul"
    results = outs // 2 if gated else outs
    padded = triton.next_power_of_2(rows)
    strip = STRIPS[padded]
    block_out = strip.out // 2 if gated else strip.out
    out = x.new_empty((rows, results))
    _rows_kernel[(triton.cdiv(results, block_out),)](
        x,
        *weight,
        bias,
        out,
        rows,
        results,
        ins,
        x.stride(0),
        padded,
        block_out,
        max(RUN, min(strip.columns, triton.next_power_of_2(ins))),
        RUN,
        AHEAD,
        activation,
        **options(strip.warps, AHEAD),
    )
    return out


def _dequantized(x: Tensor, weight: Int8, bias: Tensor | None) -> Tensor:
    """The product with W in x's dtype."""
    outs, ins = weight.values.shape
    out, step = x.new_empty(len(x), outs), max(1, LARGEST // ins // ALIGNED) * ALIGNED
    matrix = x.new_empty(min(step, outs), ins)
    for first in range(0, outs, step):
        values, scale = (part[first : first + step] for part in weight)
        wide, into = matrix[: len(scale)], out[:, first : first + step]
        grid = len(scale), triton.cdiv(ins, BLOCK)
        _dequantize_kernel[grid](values, scale, wide, ins, BLOCK, **options(warps(BLOCK)))
        if bias is None:
            torch.mm(x, wide.T, out=into)
        else:
            torch.addmm(bias[first : first + step], x, wide.T, out=into)
    return out
