"""Groups whose first tokens lie in the same pages: read once per block of members, merged as if each had read them."""

from __future__ import annotations

from dataclasses import replace

import attended
import pytest
import torch
from attended import SLOPES
from closeness import DTYPES, noise, poisoned_memory
from paged import Paged, random_pages
from torch import Tensor

from tandem.kernels.attention import CHUNK
from tandem.kernels.triton import attention_work, paged_attention

SCALE = 0.2
SIZE = 64


def group(paged: Paged, first: int, last: int, tokens: int) -> Paged:
    """The same with rows [first, last) on the first row's pages for their first `tokens` tokens."""
    table, k, v = paged.sequences.page_table.clone(), list(paged.k), list(paged.v)
    pages = -(-tokens // SIZE)
    table[first:last, :pages] = table[first, :pages].clone()
    for row in range(first, last):
        for part in (k, v):
            part[row] = torch.cat((part[first][: pages * SIZE], part[row][pages * SIZE :]))[: len(part[row])]
    return replace(paged, sequences=paged.sequences._replace(page_table=table), k=k, v=v)


def grouped(lengths: list[int], kv_heads: int, dtype: torch.dtype) -> tuple[Paged, Tensor]:
    """Rows 1 to 3 share 300 tokens (one chunk), rows 5 and 6 share 570 (two)."""
    paged = random_pages([(length, 1) for length in lengths], kv_heads, 16, SIZE, dtype)
    prefixes = torch.zeros(2, len(lengths), dtype=torch.int32)
    prefixes[0] = torch.arange(len(lengths))
    for first, last, tokens in ((1, 4, 5 * SIZE), (5, 7, 9 * SIZE)):
        paged = group(paged, first, last, tokens)
        prefixes[0, first:last], prefixes[1, first:last] = first, tokens
    return paged, prefixes.to(paged.sequences.lengths.device)


LENGTHS = [40, 321, 330, 500, 290, 577, 700]


def attend(q: Tensor, paged: Paged, prefixes: Tensor | None, **options: object) -> Tensor:
    with poisoned_memory():
        work = attention_work(paged.sequences.lengths, len(q), 30, prefixes)
        sequences = paged.sequences._replace(work=work)
        return paged_attention(q, paged.cache, sequences, SCALE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", [{}, {"alibi": SLOPES, "window": 310, "softcap": 1.5}], ids=["plain", "all"])
def test_groups_of_int8_pages(options: dict[str, object], dtype: torch.dtype) -> None:
    """The prefix's scales are shared with its pages."""
    paged, prefixes = grouped(LENGTHS, 2, torch.int8)
    q = noise(7, 8, 16, dtype=dtype)
    chosen = attended.on_device(options)
    attended.check(attend(q, paged, prefixes, **chosen), q, paged, SCALE, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"alibi": SLOPES, "window": 310, "softcap": 1.5}, {"window": 20}])
def test_groups(options: dict[str, object], dtype: torch.dtype) -> None:
    paged, prefixes = grouped(LENGTHS, 2, dtype)
    q = noise(7, 8, 16, dtype=dtype)
    chosen = attended.on_device(options)
    found = attend(q, paged, prefixes, **chosen)
    attended.check(found, q, paged, SCALE, **chosen)
    assert torch.equal(found[[0, 4]], attend(q, paged, None, **chosen)[[0, 4]])


@pytest.mark.parametrize("heads", [1, 6])
def test_tiles_of_members(heads: int) -> None:
    """18 members in tiles of 16 of one head each, and of 8 of 6 heads each."""
    paged = random_pages([(CHUNK + 30 + row, 1) for row in range(18)], 1, 16, SIZE, torch.float32)
    paged = group(paged, 0, 18, CHUNK)
    prefixes = torch.tensor([[0] * 18, [CHUNK] * 18]).int().to(q_device(paged))
    q = noise(18, heads, 16)
    work = attention_work(paged.sequences.lengths, 18, 36, prefixes)
    found = paged_attention(q, paged.cache, paged.sequences._replace(work=work), SCALE)
    attended.check(found, q, paged, SCALE)


def q_device(paged: Paged) -> torch.device:
    return paged.cache.k.device


def test_shared_chunks_are_read_through_the_first_member() -> None:
    """The others' own entries of the page table are not looked at for what is shared."""
    paged, prefixes = grouped(LENGTHS, 2, torch.float32)
    q = noise(7, 8, 16)
    expected = attend(q, paged, prefixes)
    table = paged.sequences.page_table.clone()
    table[2, : CHUNK // SIZE] = table[0, 0]
    found = attend(q, replace(paged, sequences=paged.sequences._replace(page_table=table)), prefixes)
    assert torch.equal(found, expected)
