"""Log-probabilities of given tokens against float64, and the same bits for the same row wherever it stands."""

from __future__ import annotations

import pytest
import torch
from closeness import DEVICE, DTYPES, assert_close, framed, noise, poisoned_memory
from torch import Tensor

from tandem.kernels.ops import TokenLogprobs
from tandem.kernels.triton import token_logprobs

SIZES = [1, 5, 4095, 4096, 4097, 9000]


def logits_of(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, spread: float = 3) -> Tensor:
    return framed((spread * noise(rows, vocab_size)).to(dtype))


def targets_of(rows: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def found(logits: Tensor, targets: Tensor, top: int, factors: Tensor | None = None) -> TokenLogprobs:
    with poisoned_memory():
        return token_logprobs(logits, targets, top, factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_values_ranks_and_the_most_likely(vocab_size: int, top: int, dtype: torch.dtype) -> None:
    logits, targets = logits_of(6, vocab_size, dtype), targets_of(6, vocab_size)
    logits[2] = logits[2] * 20  # one token has all the mass
    got = found(logits, targets, top)
    exact = logits.double().log_softmax(-1)
    chosen = exact.gather(-1, targets[:, None])
    assert_close(got.values, chosen[:, 0], torch.float32, ulps=4, magnitude=8)
    assert torch.equal(got.ranks, 1 + (logits > logits.gather(-1, targets[:, None])).sum(-1))
    likely = exact.topk(min(top, vocab_size))
    assert_close(got.top_values, likely.values, torch.float32, ulps=4, magnitude=8)
    assert torch.equal(logits.gather(-1, got.top_ids), logits.gather(-1, likely.indices))
    assert got.ranks.dtype == got.top_ids.dtype == torch.int64


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures(dtype: torch.dtype, top: int) -> None:
    """Each row at its own; at 1 the bits are those without."""
    logits, targets = logits_of(5, 9000, dtype), targets_of(5, 9000)
    factors = torch.tensor([1.0, 2.0, 0.25, 7.0, 1.0], device=DEVICE)
    plain, got = found(logits, targets, top), found(logits, targets, top, factors)
    exact = (logits.double() * factors[:, None].double()).log_softmax(-1)
    assert_close(got.values, exact.gather(-1, targets[:, None])[:, 0], torch.float32, ulps=4, magnitude=64)
    assert_close(got.top_values, exact.topk(top).values, torch.float32, ulps=4, magnitude=64)
    assert torch.equal(got.ranks, plain.ranks) and torch.equal(got.top_ids, plain.top_ids)
    assert torch.equal(got.values[::4], plain.values[::4])
    assert torch.equal(got.top_values[::4], plain.top_values[::4])


@pytest.mark.parametrize("top", [0, 2])
def test_rows_that_ask_for_nothing(top: int) -> None:
    logits, targets = logits_of(4, 5000), targets_of(4, 5000)
    every = found(logits, targets, top)
    targets[1], targets[3] = -1, -1
    some = found(logits, targets, top)
    assert some.values[1::2].tolist() == [0, 0] and some.ranks[1::2].tolist() == [0, 0]
    assert torch.equal(some.values[::2], every.values[::2]) and torch.equal(some.ranks[::2], every.ranks[::2])
    assert torch.equal(some.top_values, every.top_values)


def test_a_row_has_the_same_bits_alone_and_in_any_dtype() -> None:
    logits, targets = logits_of(5, 9000, torch.float16), targets_of(5, 9000)
    together = found(logits, targets, 0)
    wide = found(logits.float(), targets, 2)
    assert torch.equal(together.values, wide.values) and torch.equal(together.ranks, wide.ranks)
    for row in range(5):
        alone = found(logits[row : row + 1], targets[row : row + 1], 0)
        assert torch.equal(alone.values, together.values[row : row + 1])


def test_masked_tokens_have_no_mass() -> None:
    """Of a row of processed logits most are -inf, whole tiles of them."""
    logits = torch.full((2, 9000), -torch.inf, device=DEVICE)
    logits[0, 8999], logits[1, 3], logits[1, 8000] = -7.0, 2.0, 2.0
    got = found(logits, torch.tensor([8999, 8000], device=DEVICE), 3)
    assert got.values.tolist() == pytest.approx([0, -0.6931472]) and got.ranks.tolist() == [1, 1]
    assert got.top_values[1].tolist() == pytest.approx([-0.6931472, -0.6931472, -torch.inf])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, where the device makes a NaN silently
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    logits = logits_of(2, 5000)
    logits[0, 4500] = bad
    got = found(logits, torch.tensor([7, 7], device=DEVICE), 0)
    assert got.values.isfinite().tolist() == [False, True]


def test_no_rows() -> None:
    got = found(logits_of(1, 50)[:0], targets_of(0, 50), 4)
    assert got.values.shape == got.ranks.shape == (0,) and got.top_ids.shape == (0, 4)
