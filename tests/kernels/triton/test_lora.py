"""Low-rank adapters against float64: every mixture of slots in a block of rows, and what must not be touched."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, DTYPES, assert_close, frame_is_whole, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels.triton import lora

# outs, ins, rank: more outputs than a block and fewer, more columns than a chunk, more ranks than are taken at once
SHAPES = [((70,), 33, 8), ((5, 9), 600, 16), ((66, 3, 130), 64, 40)]
MIXTURES = [[1], [0], [2] * 3, [0, 3, 1, 1, 2, 0, 3], [1] * 20 + [0] * 3 + [3] * 15]
ADAPTERS = 3


def made(outs: tuple[int, ...], ins: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = noise(ADAPTERS, len(outs) * rank, ins, seed=1) / ins**0.5
    return a.to(dtype), (noise(ADAPTERS, rank, sum(outs), seed=2) / rank**0.5).to(dtype)


def exact(x: Tensor, a: Tensor, b: Tensor, outs: tuple[int, ...], slots: list[int], y: Tensor) -> Tensor:
    result = y.double()
    rank = b.shape[1]
    for row, slot in enumerate(slots):
        if slot:
            inner = (a[slot - 1].double() @ x[row].double()).split(rank)
            parts = b[slot - 1].double().split_with_sizes(outs, 1)
            result[row] += torch.cat([part @ up for part, up in zip(inner, parts, strict=True)])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins", "rank"), SHAPES)
@pytest.mark.parametrize("slots", MIXTURES, ids=str)
def test_lora(slots: list[int], outs: tuple[int, ...], ins: int, rank: int, dtype: torch.dtype) -> None:
    """Rows of slot 0 keep their bits and a row has the same ones alone."""
    rows = len(slots)
    x, y = framed(noise(rows, ins, dtype=dtype)), framed(noise(rows, sum(outs), dtype=dtype, seed=3))
    a, b = made(outs, ins, rank, dtype)
    before = y.clone()
    with poisoned_memory():
        lora(x, a, b, outs, torch.tensor(slots, device=DEVICE), y)
    assert_close(y, exact(x, a, b, outs, slots, before), dtype, ulps=16 if dtype == torch.float32 else 1, magnitude=1)
    assert frame_is_whole(x) and frame_is_whole(y)
    bases = [row for row, slot in enumerate(slots) if not slot]
    assert torch.equal(y[bases], before[bases])
    row = len(slots) // 2
    alone = before[row : row + 1].clone()
    lora(x[row : row + 1], a, b, outs, torch.tensor(slots[row : row + 1], device=DEVICE), alone)
    assert torch.equal(alone[0], y[row])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy under the interpreter; that is the case
def test_an_adapter_that_overflows_stays_among_its_rows() -> None:
    a, b = made((16,), 32, 8, torch.float32)
    a[0] = torch.inf
    y, slots = noise(4, 16), torch.tensor([1, 2, 0, 2], device=DEVICE)
    lora(noise(4, 32), a, b, (16,), slots, y)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_no_rows() -> None:
    a, b = made((16,), 32, 8, torch.float32)
    lora(noise(0, 32), a, b, (16,), torch.zeros(0, dtype=torch.int64, device=DEVICE), noise(0, 16))
