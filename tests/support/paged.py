"""Random paged K and V: shuffled page tables, poison in every slot that must not be read.

Letters: B sequences, K kv heads, H head size, P pages, S page size, M page-table width, L length of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from closeness import DEVICE, poison
from torch import Tensor

from tandem.kernels.ops import KVLayer, Sequences

BEYOND = 2**31 - 1  # fills the table behind a sequence's last page: whoever reads K there leaves the process


@dataclass(frozen=True)
class Paged:
    """Filled pages, and what they hold: `k[b]`, `v[b]` [L, K, H] float64 (int8 with its scale multiplied in)."""

    cache: KVLayer
    sequences: Sequences
    k: list[Tensor]
    v: list[Tensor]


def empty_cache(pages: int, kv_heads: int, size: int, width: int, dtype: torch.dtype) -> KVLayer:
    """Pages [P, K, S, H] of poison: NaN, or 99 with scales of NaN. K and V of a page lie side by side."""
    shape = (pages, 2, kv_heads, size)
    k, v = torch.full((*shape, width), poison(dtype), dtype=dtype, device=DEVICE).unbind(1)
    if dtype != torch.int8:
        return KVLayer(k, v)
    return KVLayer(k, v, *torch.full(shape, torch.nan, dtype=torch.float16, device=DEVICE).unbind(1))


def apart(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same [P, ...] in memory where K and V of a page lie side by side, as in a `KVCache`."""
    k, v = torch.stack((k, v), 1).unbind(1)
    return k, v


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float16 scales of x [..., H], one scale per row."""
    scale = (x.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
    return (x / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


def random_pages(
    shape: list[tuple[int, int]], kv_heads: int, width: int, size: int, dtype: torch.dtype, seed: int = 0
) -> Paged:
    """`shape`: (length, rows of this step) of each sequence, those that decode (one row) first."""
    counts = [rows for _, rows in shape]
    decodes = next((index for index, rows in enumerate(counts) if rows != 1), len(counts))
    lengths = [length for length, _ in shape]
    generator = torch.Generator().manual_seed(seed)
    pages = sum(-(-length // size) for length in lengths) + 2
    cache = empty_cache(pages, kv_heads, size, width, dtype)
    free = torch.randperm(pages, generator=generator).tolist()
    table = torch.full((len(shape), -(-max(lengths) // size) + 1), BEYOND, dtype=torch.int32)
    dense: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, length in enumerate(lengths):
        used = [free.pop() for _ in range(-(-length // size))]
        table[index, : len(used)] = torch.tensor(used)
        position = torch.arange(length)
        page, offset = torch.tensor(used)[position // size].to(DEVICE), (position % size).to(DEVICE)
        for part, stored, scales in zip(dense, cache[:2], cache[2:], strict=True):
            x = torch.randn(length, kv_heads, width, generator=generator)
            if scales is None:
                values = x.to(dtype).to(DEVICE)
                part.append(values.double())
            else:
                values, scale = (y.to(DEVICE) for y in quantize(x))
                scales[page, :, offset] = scale
                part.append(values.double() * scale.double().unsqueeze(-1))
            stored[page, :, offset] = values
    sequences = Sequences(
        torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        table.to(DEVICE),
        decodes,
        max(counts),
        max(lengths),
    )
    return Paged(cache, sequences, *dense)


def same_cache(found: KVLayer, expected: KVLayer) -> None:
    """Bit by bit, poison included."""
    for name, part, other in zip(KVLayer._fields, found, expected, strict=True):
        if part is None or other is None:
            assert part is other, name
        else:
            assert part.dtype == other.dtype and torch.equal(part.isnan(), other.isnan()), f"{name}: other slots"
            assert torch.equal(part.nan_to_num(nan=0), other.nan_to_num(nan=0)), f"{name}: other values"
