"""Decode rows: chunks of K and V from a list of work, and their merge, against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace

import attended
import pytest
import torch
from attended import SLOPES
from closeness import DTYPES, noise, poisoned_memory
from paged import Paged, random_pages
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.attention import CHUNK
from tandem.kernels.triton import attention_work, paged_attention

SCALE = 0.2
# Around a slot, a page, a tile, a chunk and two of them.
LENGTHS = [1, 16, 17, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
OPTIONS = {
    "plain": {},
    "alibi": {"alibi": SLOPES},
    "window 1": {"window": 1},
    "window 40": {"window": 40},
    "window 300": {"window": 300},
    "softcap": {"softcap": 1.5},
    "all": {"alibi": SLOPES, "window": 290, "softcap": 1.5},
}


def decoding(lengths: list[int], kv_heads: int, width: int, size: int, dtype: torch.dtype) -> Paged:
    return random_pages([(length, 1) for length in lengths], kv_heads, width, size, dtype)


def attend(q: Tensor, paged: Paged, work: Tensor | None = None, **options: object) -> Tensor:
    sequences = paged.sequences._replace(work=work)
    with poisoned_memory():
        return paged_attention(q, paged.cache, sequences, SCALE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    paged = decoding([700, 3, CHUNK + 1], 2, 32, 64, torch.float32)
    q = noise(3, 8, 32)
    chosen = attended.on_device(OPTIONS[options])
    attended.check(attend(q, paged, **chosen), q, paged, SCALE, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 64, 24])
def test_lengths(size: int, dtype: torch.dtype) -> None:
    paged = decoding(LENGTHS, 1, 16, size, dtype)
    q = noise(len(LENGTHS), 4, 16, dtype=dtype)
    attended.check(attend(q, paged), q, paged, SCALE)


@pytest.mark.parametrize("heads, kv_heads, width", [(3, 3, 16), (6, 2, 40), (7, 1, 24), (20, 1, 16)])
def test_shapes(heads: int, kv_heads: int, width: int) -> None:
    """Groups and head sizes that are no powers of two; heads that a tile of 16 rows does not hold."""
    paged = decoding([9, CHUNK + 30], kv_heads, width, 32, torch.float32)
    q = noise(2, heads, width)
    attended.check(attend(q, paged), q, paged, SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_int8_pages(options: str, dtype: torch.dtype) -> None:
    paged = decoding([300, 70, 1], 2, 32, 64, torch.int8)
    q = noise(3, 8, 32, dtype=dtype)
    chosen = attended.on_device(OPTIONS[options])
    attended.check(attend(q, paged, **chosen), q, paged, SCALE, **chosen)


@pytest.mark.parametrize("size", [16, 24, 64])
def test_int8_lengths(size: int) -> None:
    """With scales of NaN in every slot that must not be read."""
    paged = decoding(LENGTHS, 1, 16, size, torch.int8)
    q = noise(len(LENGTHS), 4, 16, dtype=torch.float16)
    attended.check(attend(q, paged), q, paged, SCALE)


def test_pages_of_another_dtype_than_q() -> None:
    """Products are float32 then."""
    paged = decoding([70, 300], 2, 16, 64, torch.float16)
    q = noise(2, 4, 16)
    attended.check(attend(q, paged), q, paged, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    """q is a view of the rows of a product; pages [P, S, K, H] behind the strides of [P, K, S, H]."""
    paged = decoding([70, 300, 5], 2, 32, 64, dtype)
    views = [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in paged.cache]
    assert views[0].stride() != paged.cache.k.stride()
    wide = noise(3, (4 + 2 * 2) * 32)
    q = wide[:, : 4 * 32].unflatten(-1, (4, 32))
    strided = replace(paged, cache=ops.KVLayer(*views))
    found = attend(q, strided)
    attended.check(found, q, paged, SCALE)


def test_a_list_for_the_step() -> None:
    """A list with room to spare gives the bits that a list made for the layer gives, and padding rows are zero."""
    paged = decoding([600, 1, 257, 40], 2, 16, 64, torch.float32)
    q = noise(4, 4, 16)
    lengths = paged.sequences.lengths
    own = attend(q, paged)
    assert torch.equal(attend(q, paged, attention_work(lengths, 4, 50)), own)
    empty = lengths.clone()
    empty[[1, 3]] = 0
    padded = replace(paged, sequences=paged.sequences._replace(lengths=empty))
    found = attend(q, padded, attention_work(empty, 4, 7))
    assert torch.equal(found[[0, 2]], own[[0, 2]])
    assert not found[[1, 3]].any()


def test_rows_that_do_not_fit_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = decoding([CHUNK, 600, 40], 1, 16, 64, torch.float32)
    q = noise(3, 2, 16)
    expected = attend(q, paged)
    sequences = paged.sequences._replace(work=attention_work(paged.sequences.lengths, 3, 3))
    monkeypatch.setattr(torch, "empty", torch.zeros)  # no NaN that the kernels did not write
    found = paged_attention(q, paged.cache, sequences, SCALE)
    assert torch.equal(found[0], expected[0])
    assert found[1:].isnan().all()


def test_a_row_does_not_depend_on_the_batch() -> None:
    paged = decoding([600, 33, 257, 1], 2, 16, 64, torch.float16)
    q = noise(4, 4, 16, dtype=torch.float16)
    together = attend(q, paged)
    sequences = paged.sequences
    for row in range(4):
        alone = sequences._replace(
            query_starts=sequences.query_starts[:2],
            lengths=sequences.lengths[row : row + 1],
            page_table=sequences.page_table[row : row + 1],
            decodes=1,
        )
        found = attend(q[row : row + 1], replace(paged, sequences=alone))
        assert torch.equal(found[0], together[row])


def test_the_definition_agrees() -> None:
    paged = decoding([300, 70, 1], 2, 32, 16, torch.float32)
    q = noise(3, 8, 32)
    expected = ops.paged_attention.__wrapped__(q, paged.cache, paged.sequences, SCALE)  # type: ignore[attr-defined]
    torch.testing.assert_close(attend(q, paged), expected, rtol=1e-5, atol=1e-5)
