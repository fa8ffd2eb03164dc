"""Deterministic mode: a row has the same bits alone, in any batch, in any chunk of its prompt and as a decode."""

from __future__ import annotations

from dataclasses import replace

import attended
import pytest
import torch
from attended import SLOPES
from closeness import DTYPES, noise, poisoned_memory
from paged import Paged, random_pages
from torch import Tensor

from tandem.kernels.triton import attention_work, paged_attention

SCALE = 0.2
LENGTHS = [300, 18, 70]
OPTIONS = {"plain": {}, "all": {"alibi": SLOPES[:4], "window": 70, "softcap": 1.5}}
Piece = tuple[int, int, int]  # sequence, first position, position behind the last


def attend(queries: list[Tensor], paged: Paged, pieces: list[Piece], **options: object) -> list[Tensor]:
    """One step that computes these rows, decodes first, and what it gives for each piece."""
    counts = [last - first for _, first, last in pieces]
    lengths = [last for _, _, last in pieces]
    device = paged.cache.k.device
    sequences = paged.sequences._replace(
        query_starts=torch.tensor([0, *counts]).cumsum(0).int().to(device),
        lengths=torch.tensor(lengths).int().to(device),
        page_table=paged.sequences.page_table[[at for at, _, _ in pieces]],
        decodes=next((at for at, count in enumerate(counts) if count != 1), len(counts)),
        max_query=max(counts),
        max_length=max(lengths),
        deterministic=True,
    )
    q = torch.cat([queries[at][first:last] for at, first, last in pieces])
    with poisoned_memory():
        found = paged_attention(q, paged.cache, sequences, SCALE, **options)  # type: ignore[arg-type]
    return list(found.split(counts))


@pytest.mark.parametrize("pages", [torch.float16, torch.int8], ids=["fp16", "int8"])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_a_row(options: str, pages: torch.dtype) -> None:
    paged = random_pages([(length, length) for length in LENGTHS], 1, 16, 64, pages)
    queries = [noise(length, 4, 16, dtype=torch.float16, seed=length) for length in LENGTHS]
    chosen = attended.on_device(OPTIONS[options])
    whole = attend(queries, paged, [(at, 0, length) for at, length in enumerate(LENGTHS)], **chosen)
    for pieces in (
        [(0, 299, 300)],
        [(0, 299, 300), (1, 17, 18), (2, 69, 70)],
        [(0, 255, 256), (0, 256, 257), (1, 0, 1), (1, 3, 18), (0, 250, 261), (2, 30, 35)],
    ):
        for (at, first, last), found in zip(pieces, attend(queries, paged, pieces, **chosen), strict=True):
            assert torch.equal(found, whole[at][first:last]), f"rows {first} to {last} of {at} in {pieces}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["same", "int8"])
def test_values(int8: bool, dtype: torch.dtype) -> None:
    shape = [(280, 1), (40, 1), (270, 20), (9, 9)]
    paged = random_pages(shape, 2, 16, 64, torch.int8 if int8 else dtype)
    q = noise(31, 8, 16, dtype=dtype)
    with poisoned_memory():
        found = paged_attention(q, paged.cache, paged.sequences._replace(deterministic=True), SCALE)
    attended.check(found, q, paged, SCALE)


def test_groups_are_refused() -> None:
    paged = random_pages([(280, 1), (300, 1)], 1, 16, 64, torch.float32)
    lengths = paged.sequences.lengths
    work = attention_work(lengths, 2, 4, torch.tensor([[0, 0], [256, 256]], device=lengths.device).int())
    sequences = paged.sequences._replace(work=work, deterministic=True)
    with pytest.raises(AssertionError, match="rows of a group"):
        paged_attention(noise(2, 2, 16), paged.cache, sequences, SCALE)


def test_the_backend_of_the_definition() -> None:
    paged = random_pages([(40, 1), (20, 9)], 2, 16, 64, torch.float32)
    q = noise(10, 8, 16)
    found = paged_attention(q, paged.cache, paged.sequences._replace(backend="torch"), SCALE)
    attended.check(found, q, replace(paged), SCALE)
