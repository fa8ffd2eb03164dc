"""A loop that does nothing but read: the most that a kernel which streams weights or pages can reach."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a program at once
PROGRAMS = 132 * 8  # eight for each multiprocessor of an H100 or H200


@triton.jit
def _read_kernel(data, sums, per_program, BLOCK: tl.constexpr):
    """sums[p] = sum of program p's consecutive elements; traffic: each element once, 4 bytes per program written."""
    start = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, per_program, BLOCK):
        total += tl.load(data + start + offset + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def reader(data: Tensor) -> Callable[[], Tensor]:
    """A call that reads all of data [n] float32 once and returns its sum, which was compared with torch's."""
    per_program = len(data) // PROGRAMS // BLOCK * BLOCK
    sums = torch.empty(PROGRAMS, device=data.device)
    rest = data[PROGRAMS * per_program :]

    def read() -> Tensor:
        _read_kernel[(PROGRAMS,)](data, sums, per_program, BLOCK=BLOCK, num_warps=8)
        return rest.sum() + sums.sum()

    found, expected, unit = read().item(), data.sum(dtype=torch.float64).item(), len(data) ** 0.5
    assert abs(found - expected) < 0.01 * unit, f"read {found}, torch {expected}"
    return read
