"""`paged_attention` against one loop over rows and heads in float64; whatever must not be read is NaN."""

from __future__ import annotations

import math

import pytest
import torch
from paged import apart
from torch import Tensor

from tandem.kernels import attention, ops
from tandem.kernels.ops import KVLayer, Sequences

PAGE = 5
# (length, rows of this step): one row or a chunk, ends before, at and after a page's.
DECODES = [(1, 1), (4, 1), (5, 1), (6, 1), (23, 1), (40, 1)]
CHUNKS = [(2, 2), (4, 4), (5, 5), (6, 6), (6, 2), (23, 11), (40, 39), (123, 60)]


class Case:
    """A filled cache with shuffled pages, and the dense K and V it was filled from."""

    def __init__(self, shape: list[tuple[int, int]], heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.heads, self.kv_heads = shape, heads, kv_heads
        lengths = [length for length, _ in shape]
        counts = [rows for _, rows in shape]
        pages = sum(-(-length // PAGE) for length in lengths)
        size = (pages + 2, kv_heads, PAGE, width)
        k, v = torch.full(size, torch.nan), torch.full(size, torch.nan)
        free = torch.randperm(pages + 2, generator=generator).tolist()
        table = torch.full((len(shape), -(-max(lengths) // PAGE) + 1), -1, dtype=torch.int32)  # -1: must not be read
        self.dense: list[tuple[Tensor, Tensor]] = []
        for index, length in enumerate(lengths):
            dense = torch.randn(2, length, kv_heads, width, generator=generator)
            for start in range(0, length, PAGE):
                page = free.pop()
                table[index, start // PAGE] = page
                part = dense[:, start : start + PAGE].transpose(1, 2)
                k[page, :, : part.shape[2]], v[page, :, : part.shape[2]] = part
            self.dense.append((dense[0], dense[1]))
        self.cache = KVLayer(*apart(k.to(dtype), v.to(dtype)))
        if dtype != torch.float32:
            self.dense = [(a.to(dtype).float(), b.to(dtype).float()) for a, b in self.dense]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        self.sequences = Sequences(
            starts, torch.tensor(lengths).int(), table, counts.count(1), max(counts), max(lengths)
        )
        self.q = torch.randn(sum(counts), heads, width, generator=generator)

    def expected(
        self, scale: float, alibi: Tensor | None = None, window: int | None = None, softcap: float | None = None
    ) -> Tensor:
        rows: list[Tensor] = []
        for (length, count), (k, v) in zip(self.shape, self.dense, strict=True):
            for position in range(length - count, length):
                query = self.q[len(rows)].double()
                seen = [j for j in range(position + 1) if window is None or j > position - window]
                out = torch.empty(query.shape, dtype=torch.float64)
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    scores = []
                    for j in seen:
                        score = scale * float(query[head] @ k[j, kv_head].double())
                        if softcap is not None:
                            score = softcap * math.tanh(score / softcap)
                        scores.append(score + (0 if alibi is None else float(alibi[head]) * (j - position)))
                    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                    out[head] = weights @ v[seen, kv_head].double()
                rows.append(out)
        return torch.stack(rows)


CASES = {"decodes": DECODES, "chunks": CHUNKS, "mixed": DECODES[1:4] + CHUNKS[3:6], "one": [(9, 1)]}
OPTIONS = {
    "plain": {},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.3, 0.7, 0.01, 0.1])},
    "window 1": {"window": 1},
    "window 6": {"window": 6},
    "window 30": {"window": 30},
    "softcap": {"softcap": 1.5},
    "all": {"alibi": torch.tensor([0.5, 0.25, 0.3, 0.7, 0.01, 0.1]), "window": 9, "softcap": 1.5},
}


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", CASES)
def test_paged_attention(shape: str, options: str, kv_heads: int) -> None:
    case = Case(CASES[shape], 6, kv_heads, 8, torch.float32)
    found = ops.paged_attention(case.q, case.cache, case.sequences, 0.4, **OPTIONS[options])
    torch.testing.assert_close(found.double(), case.expected(0.4, **OPTIONS[options]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", ["plain", "all"])
def test_rounds_of_few_elements(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds of gathered sequences and many blocks of masks give what one gives."""
    monkeypatch.setattr(attention, "GATHER_ELEMENTS", 300)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 1000)
    case = Case(CASES["decodes"] + CASES["chunks"], 6, 2, 8, torch.float32)
    found = ops.paged_attention(case.q, case.cache, case.sequences, 0.4, **OPTIONS[options])
    torch.testing.assert_close(found.double(), case.expected(0.4, **OPTIONS[options]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_q_and_cache_may_differ(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = Case(CASES["mixed"], 6, 2, 8, cache_dtype)
    case.q = case.q.to(dtype)
    found = ops.paged_attention(case.q, case.cache, case.sequences, 0.4)
    assert found.dtype == dtype
    error = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(found.double(), case.expected(0.4), rtol=error, atol=error)


def test_int8_pages() -> None:
    """What was written through `write_kv` is read back with its scales."""
    case = Case(CASES["mixed"], 6, 2, 8, torch.float32)
    pages = case.cache.k.shape[0]
    scales = torch.full((pages, 2, PAGE), torch.nan, dtype=torch.float16)
    values = torch.zeros(case.cache.k.shape, dtype=torch.int8)
    cache = KVLayer(*apart(values, values), *apart(scales, scales))
    for index, (k, v) in enumerate(case.dense):
        position = torch.arange(len(k))
        slots = case.sequences.page_table[index, position // PAGE] * PAGE + position % PAGE
        ops.write_kv(k, v, slots.long(), cache)
    found = ops.paged_attention(case.q, cache, case.sequences, 0.4)
    torch.testing.assert_close(found.double(), case.expected(0.4), rtol=0.03, atol=0.03)


def test_a_sequence_without_rows_is_passed_over() -> None:
    case = Case([(6, 1), (7, 3)], 6, 2, 8, torch.float32)
    starts = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    order = torch.tensor([0, 0, 1])
    sequences = case.sequences._replace(
        query_starts=starts, lengths=case.sequences.lengths[order], page_table=case.sequences.page_table[order]
    )
    found = ops.paged_attention(case.q, case.cache, sequences, 0.4)
    torch.testing.assert_close(found.double(), case.expected(0.4), rtol=1e-5, atol=1e-5)
