"""`paged_attention` in fixed order: a row has the same bits alone, in any batch, in any chunk and as a decode."""

from __future__ import annotations

import pytest
import torch
from paged import apart
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.ops import KVLayer, Sequences

PAGE, HEADS, KV_HEADS, WIDTH = 24, 6, 2, 40
SLOPES = torch.tensor([0.5, 0.25, 0.3, 0.7, 0.01, 0.1])
# What runs on this CPU, and what defines it.
OPERATIONS = {"here": ops.paged_attention, "definition": ops.paged_attention.__wrapped__}  # type: ignore[attr-defined]
OPTIONS = {"plain": {}, "all": {"alibi": SLOPES, "window": 70, "softcap": 2.5}}
LENGTHS = [300, 1, 257, 40, 256, 16, 17, 64] + [3 + 5 * index for index in range(56)]

Piece = tuple[int, int, int]  # sequence, first position, position behind the last


class Prompts:
    """Sequences of `LENGTHS` tokens in shuffled pages: all K and V, and the query rows of every position."""

    def __init__(self, dtype: torch.dtype, operation: str, int8: bool = False) -> None:
        self.operation = OPERATIONS[operation]
        generator = torch.Generator().manual_seed(3)
        width = -(-max(LENGTHS) // PAGE)
        pages = len(LENGTHS) * width
        self.table = torch.randperm(pages, generator=generator).view(len(LENGTHS), width).int()
        self.queries = [torch.randn(n, HEADS, WIDTH, generator=generator).to(dtype) for n in LENGTHS]
        shape = (pages, KV_HEADS, PAGE, WIDTH)
        k, v = torch.randn(2, *shape, generator=generator)
        if int8:
            scales = torch.rand(2, *shape[:3], generator=generator).half() / 100
            values = apart(k.mul(40).to(torch.int8), v.mul(40).to(torch.int8))
            self.cache = KVLayer(*values, *apart(*scales))
        else:
            self.cache = KVLayer(*apart(k.to(dtype), v.to(dtype)))

    def attend(self, pieces: list[Piece], options: dict[str, object], deterministic: bool = True) -> list[Tensor]:
        """One step that computes these rows, decodes first, and what it gives for each piece."""
        index = [piece[0] for piece in pieces]
        counts = [last - first for _, first, last in pieces]
        lengths = [last for _, _, last in pieces]
        decodes = next((at for at, count in enumerate(counts) if count != 1), len(counts))
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        sequences = Sequences(
            starts,
            torch.tensor(lengths).int(),
            self.table[index],
            decodes,
            max(counts),
            max(lengths),
            deterministic=deterministic,
        )
        q = torch.cat([self.queries[at][first:last] for at, first, last in pieces])
        return list(self.operation(q, self.cache, sequences, 0.3, **options).split(counts))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bits_of_a_row(operation: str, kind: str, options: str) -> None:
    prompts = Prompts(torch.bfloat16 if kind == "bfloat16" else torch.float32, operation, int8=kind == "int8")
    chosen = OPTIONS[options]
    whole = prompts.attend([(at, 0, n) for at, n in enumerate(LENGTHS)], chosen)

    def check(pieces: list[Piece]) -> None:
        for (at, first, last), found in zip(pieces, prompts.attend(pieces, chosen), strict=True):
            assert torch.equal(found, whole[at][first:last]), f"rows {first} to {last} of sequence {at} of {pieces}"

    check([(0, 0, 300)])
    for at, n in enumerate(LENGTHS[:8]):
        check([(at, n - 1, n)])
    check([(0, 299, 300), (2, 256, 257), (4, 255, 256)])
    check([(at, n - 1, n) for at, n in enumerate(LENGTHS)])  # 64 decodes
    check([(3, 39, 40), (5, 4, 5), (0, 0, 100), (2, 250, 257), (1, 0, 1)])  # decodes and chunks
    for first in range(0, 300, 37):
        check([(0, first, min(first + 37, 300))])
    for length in (1, 2, 16, 17, 48, 256, 257):
        check([(0, length - 1, length)])


@pytest.mark.parametrize("options", OPTIONS)
def test_the_value_is_that_of_the_free_order(options: str) -> None:
    prompts = Prompts(torch.float32, "definition")
    pieces = [(4, 255, 256), (5, 15, 16), (0, 0, 300), (2, 20, 257)]
    fixed, free = (torch.cat(prompts.attend(pieces, OPTIONS[options], alone)) for alone in (True, False))
    torch.testing.assert_close(fixed, free, rtol=1e-5, atol=1e-5)
    assert not torch.equal(fixed, free)  # or the flag did nothing


@pytest.mark.parametrize("operation", OPERATIONS)
def test_padding_rows_are_zero(operation: str) -> None:
    prompts = Prompts(torch.float32, operation)
    starts, lengths = torch.arange(5).int(), torch.tensor([0, 40, 0, 7]).int()
    table = torch.full((4, 2), -1).int()
    table[[1, 3]] = prompts.table[[3, 5], :2]
    q = prompts.queries[0][:4]
    for deterministic in (False, True):
        sequences = Sequences(starts, lengths, table, 4, 1, 40, deterministic=deterministic)
        found = prompts.operation(q, prompts.cache, sequences, 0.3)
        assert not found[[0, 2]].any()
        alone = sequences._replace(
            query_starts=starts[:3], lengths=lengths[[1, 3]], page_table=table[[1, 3]], decodes=2
        )
        expected = prompts.operation(q[[1, 3]], prompts.cache, alone, 0.3)
        torch.testing.assert_close(found[[1, 3]], expected)


def read(work: Tensor, first: int, count: int) -> list[list[int]]:
    return work[first : first + 5, :count].T.tolist()


def test_work() -> None:
    assert [ops.decode_chunks(length) for length in (0, 1, 256, 257, 512, 513)] == [1, 1, 1, 2, 2, 3]
    lengths = torch.tensor([256, 600, 0, 257, 9]).int()
    work = ops.attention_work(lengths, 4, 7)  # the last is no decode
    assert work.shape == (7, 7) and work.dtype == torch.int32
    assert work[1, :4].tolist() == [0, 1, 4, 5]
    expected = [[0, 0, 1, 0, 1], *([1, 1, 1, c, c + 1] for c in range(3)), [2, 2, 1, 0, 1]]
    assert read(work, 2, int(work[0, 0])) == [*expected, [3, 3, 1, 0, 1], [3, 3, 1, 1, 2]]


def test_work_of_groups() -> None:
    """Shared chunks are read once per block of members; a row keeps slots for all of its chunks."""
    lengths = torch.tensor([300] + [800] * 18 + [520]).int()
    prefixes = torch.zeros(2, 20).int()
    prefixes[0] = torch.tensor([0] + [1] * 18 + [19])
    prefixes[1, 1:19] = 700
    work = ops.attention_work(lengths, 20, 77, prefixes)
    assert work.shape == (12, 77)
    assert work[1, :20].tolist() == [0, *(2 + 4 * row for row in range(18)), 74]
    own = read(work, 2, int(work[0, 0]))
    assert own[:4] == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 2], [1, 1, 1, 2, 3], [1, 1, 1, 3, 4]]
    assert len(own) == 2 + 18 * 2 + 3
    assert read(work, 7, int(work[0, 1])) == [[1, 1, 16, 0, 1], [1, 1, 16, 1, 2], [17, 17, 2, 0, 1], [17, 17, 2, 1, 2]]


def test_rows_that_do_not_fit_are_marked() -> None:
    work = ops.attention_work(torch.tensor([256, 600, 10]).int(), 3, 3)
    assert work[1].tolist() == [0, -1, -1]
    assert int(work[0, 0]) == 1
