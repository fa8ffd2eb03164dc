"""The lists of work that the device makes, against the definition's."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, poisoned_memory
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.attention import FIELDS
from tandem.kernels.triton import attention_work
from tandem.kernels.triton.attention_work import row_work


def assert_same_lists(found: Tensor, expected: Tensor, decodes: int) -> None:
    """What the counts say is there; the rest may be anything."""
    assert found.shape == expected.shape and found.dtype == torch.int32
    found = found.cpu()
    assert found[0, :2].tolist() == expected[0, :2].tolist()
    assert found[1, :decodes].tolist() == expected[1, :decodes].tolist()
    for number in range(len(expected) // FIELDS):
        first, count = 2 + number * FIELDS, int(expected[0, number])
        assert found[first : first + FIELDS, :count].tolist() == expected[first : first + FIELDS, :count].tolist()


def check(lengths: list[int], decodes: int, capacity: int, prefixes: Tensor | None = None) -> None:
    given = torch.tensor(lengths, dtype=torch.int32)
    expected = ops.attention_work(given, decodes, capacity, prefixes)
    with poisoned_memory():
        found = attention_work(given.to(DEVICE), decodes, capacity, None if prefixes is None else prefixes.to(DEVICE))
    assert_same_lists(found, expected, decodes)


@pytest.mark.parametrize("capacity", [40, 23, 9])
def test_rows(capacity: int) -> None:
    """Room for all, for just all, and too little from the third row on."""
    check([300, 1, 2000, 256, 257, 0, 511, 2048, 7], 8, capacity)


def test_many_rows() -> None:
    """More rows than are summed, and more chunks than are written, at a time."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 700, (150,), generator=generator).tolist()
    check([*lengths, 40000, 5], 152, 1000)


def test_groups() -> None:
    rows = 40
    prefixes = torch.zeros(2, rows + 3, dtype=torch.int32)
    prefixes[0] = torch.arange(rows + 3)
    prefixes[0, 3:20], prefixes[1, 3:20] = 3, 520  # 17 members
    prefixes[0, 20:22], prefixes[1, 20:22] = 20, 255  # no whole chunk
    prefixes[0, 30:40], prefixes[1, 30:40] = 30, 256
    lengths = [600 + 50 * (row % 7) for row in range(rows)] + [1, 2, 3]
    check(lengths, rows, 400, prefixes)
    check(lengths, rows, 60, prefixes)


def test_rows_of_prompts() -> None:
    """Blocks of rows with all that they see, and each row's end."""
    counts, lengths = [1, 1, 5, 0, 300, 8], [9, 4, 5, 70, 400, 800]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    with poisoned_memory():
        work, ends = row_work(starts.to(DEVICE), torch.tensor(lengths).int().to(DEVICE), 2, int(starts[-1]), 4)
    entries: list[tuple[int, ...]] = []
    wanted_ends: list[int] = []
    for sequence in range(2, 6):
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        wanted_ends += range(lengths[sequence] - (last - first) + 1, lengths[sequence] + 1)
        for row in range(first, last, 4):
            behind = min(row + 4, last)
            chunks = ops.decode_chunks(lengths[sequence] - (last - behind))
            entries.append((sequence, row, behind - row, 0, chunks))
    count = int(work[0, 0])
    assert list(zip(*work[2:, :count].tolist(), strict=True)) == entries
    assert ends[2:].tolist() == wanted_ends
    assert work.shape[1] >= count
