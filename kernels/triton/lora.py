"""Low-rank adapters, a slot per row: y += B · (A · x).

`_shrink_kernel`: a program takes ROWS neighbouring rows, a block of A and CHUNK columns, and writes partial sums in
float32. For each adapter among its rows it reads that part of A once: rows of one adapter that stand together, as those
of a prompt do, share it. `_expand_kernel` adds up the partial sums in order, multiplies them with a block of B, and
adds the result to y, which is read and written once. Rows of slot 0 cost their slot. Per step and matrix: n r D + r O
values of each adapter for every ROWS rows that have it, 4 n r · ceil(D / CHUNK) bytes per row written and read.

Slots are read on the device, so a recorded launch serves whatever adapters its rows have later. Blocks and chunks are
those of the matrix, whatever T is, and a row takes nothing from a product with another adapter: its bits are its own.

Letters: T rows, D = ins, O = outs, n matrices in one, r rank, S adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options
from .write import check_index


class Block(NamedTuple):
    """Of `_shrink_kernel`: rows of A at most, columns of a chunk at a time, and how many such are on their way."""

    lines: int
    columns: int
    stages: int


ROWS = 16  # of a program: what a matrix instruction takes at least
CHUNK = 512  # columns of x and A; with D = 4096 a step of 16 rows is 8 programs
BLOCKS: Mapping[int, Block] = MappingProxyType({2: Block(64, 128, 3), 4: Block(32, 64, 2)})  # by bytes of an element
RANKS = 32  # of B at a time
OUTS = 64  # of a program
MOST_MATRICES = 3


@triton.jit(do_not_specialize=["rows"])
def _shrink_kernel(
    x,
    a,
    slots,
    partial,
    rows,
    ins,
    lines,
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * CHUNK
    line = tl.program_id(2) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < rows, other=0)
    total = tl.zeros([BLOCK_ROWS, BLOCK_LINES], tl.float32)
    here = tl.max(slot, 0)
    while here > 0:
        own = slot == here
        place = a + (here - 1) * lines * ins
        sums = tl.zeros([BLOCK_ROWS, BLOCK_LINES], tl.float32)
        for start in range(0, CHUNK, BLOCK):
            at = first + start + column
            inside = at < ins
            value = tl.load(x + row[:, None] * x_stride + at[None, :], mask=own[:, None] & inside[None, :], other=0.0)
            w = tl.load(
                place + line[None, :] * ins + at[:, None], mask=(line < lines)[None, :] & inside[:, None], other=0.0
            )
            sums = tl.dot(value, w, sums, input_precision="ieee")
        total = tl.where(own[:, None], sums, total)
        here = tl.max(tl.where(slot < here, slot, 0), 0)
    to = partial + (tl.program_id(1) * rows + row[:, None]) * lines + line[None, :]
    tl.store(to, total, mask=(slot > 0)[:, None] & (line < lines)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _expand_kernel(
    partial,
    b,
    slots,
    y,
    rows,
    second,
    third,
    outs,
    rank,
    y_stride,
    MATRICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """`second`, `third`: where those matrices' outputs begin."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    matrix = tl.program_id(2)
    begin, end = 0, outs
    if MATRICES > 1:
        begin = tl.where(matrix == 0, 0, tl.where(matrix == 1, second, third))
        end = tl.where(matrix == MATRICES - 1, outs, tl.where(matrix == 0, second, third))
    output = begin + tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live = output < end
    line = tl.arange(0, BLOCK_RANK)
    slot = tl.load(slots + row, mask=row < rows, other=0)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    here = tl.where(begin + tl.program_id(1) * BLOCK_OUT < end, tl.max(slot, 0), 0)
    while here > 0:
        own = slot == here
        sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        for start in range(0, rank, BLOCK_RANK):
            inside = start + line < rank
            inner = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
            for chunk in range(CHUNKS):
                place = partial + ((chunk * rows + row[:, None]) * MATRICES + matrix) * rank + start + line[None, :]
                inner += tl.load(place, mask=own[:, None] & inside[None, :], other=0.0)
            place = b + ((here - 1) * rank + start + line[:, None]) * outs + output[None, :]
            w = tl.load(place, mask=inside[:, None] & live[None, :], other=0.0)
            sums = tl.dot(inner, w.to(tl.float32), sums, input_precision="ieee")
        total = tl.where(own[:, None], sums, total)
        here = tl.max(tl.where(slot < here, slot, 0), 0)
    place = y + row[:, None] * y_stride + output[None, :]
    kept = (slot > 0)[:, None] & live[None, :]
    value = tl.load(place, mask=kept, other=0.0).to(tl.float32) + total
    tl.store(place, value.to(y.dtype.element_ty), mask=kept)


def lora(x: Tensor, a: Tensor, b: Tensor, outs: tuple[int, ...], slots: Tensor, y: Tensor) -> None:
    """`ops.lora`. x [T, D] and y [T, O] may have any stride between rows, none within; at most 3 matrices in one."""
    (rows, ins), (count, rank, width), lines = x.shape, b.shape, a.shape[1]
    matrices = len(outs)
    assert matrices <= MOST_MATRICES and sum(outs) == width and lines == matrices * rank
    assert a.shape == (count, lines, ins) and a.is_contiguous() and b.is_contiguous()
    assert y.shape == (rows, width) and a.dtype == b.dtype == x.dtype == y.dtype
    assert (x.stride(1) == 1 or ins == 1) and (y.stride(1) == 1 or width == 1)
    check_index(slots, rows)
    if not rows:
        return
    chunks, blocks = triton.cdiv(ins, CHUNK), triton.cdiv(rows, ROWS)
    block = BLOCKS[x.element_size()]
    block_lines = max(16, min(block.lines, triton.next_power_of_2(lines)))
    partial = x.new_empty((chunks, rows, lines), dtype=torch.float32)
    _shrink_kernel[(blocks, chunks, triton.cdiv(lines, block_lines))](
        x,
        a,
        slots,
        partial,
        *(rows, ins, lines, x.stride(0)),
        *(ROWS, block_lines, block.columns, CHUNK),
        **options(4, block.stages),
    )
    second = outs[0]
    third = second + (outs[1] if matrices > 1 else 0)
    _expand_kernel[(blocks, triton.cdiv(max(outs), OUTS), matrices)](
        partial,
        b,
        slots,
        y,
        *(rows, second, third, width, rank, y.stride(0)),
        *(matrices, chunks, ROWS, max(16, min(RANKS, triton.next_power_of_2(rank))), OUTS),
        **options(4),
    )
