"""The draw and log-probabilities in C++ against the definitions, with every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels import sampling as definitions
from tandem.kernels.cpu import sampling
from tandem.kernels.cpu.native import SETS, native
from tandem.kernels.sampling import Draws

NATIVE = native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 127, 128, 129, 2100]
ROWS = 12
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=SETS[1 : 1 + (NATIVE.set if NATIVE else 1)], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert NATIVE is not None
    chosen = replace(NATIVE, set=SETS.index(request.param))
    monkeypatch.setattr(sampling, "native", lambda: chosen)
    yield


def logits_of(size: int, dtype: torch.dtype, spread: float = 3) -> Tensor:
    return (torch.randn(ROWS, size, generator=torch.Generator().manual_seed(size)) * spread).to(dtype)


def how(temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0, rows: int = ROWS) -> Draws:
    """Rows that differ in seed (all 64 bits of it), choice and position."""
    number, one = torch.arange(rows), torch.ones(rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(8))
    filters = torch.full((rows,), top_k), top_p * one, min_p * one
    return Draws(temperature * one, seeds, number % 3, 7 * number, *filters)


# temperature, top_k, top_p, min_p
WAYS = [(1, 0, 1, 0), (0.6, 0, 1, 0), (0, 0, 1, 0), (1, 4, 1, 0), (1, 300, 1, 0), (1, 0, 0.5, 0), (1.5, 0, 0.99, 0)]
WAYS += [(1, 0, 1e-6, 0), (1, 0, 1, 0.05), (0.8, 40, 0.9, 0.01), (1, 9000, 0.3, 0), (2, 0, 0.99999, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_tokens_as_the_definition(size: int, dtype: torch.dtype) -> None:
    for spread in (0.5, 20):
        logits = logits_of(size, dtype, spread)
        before = logits.clone()
        for way in WAYS:
            tokens, lowest = sampling.draw(logits, how(*way))
            expected, least = definitions.draw.__wrapped__(logits, how(*way))
            assert torch.equal(tokens, expected), (spread, way)
            scaled = definitions.distribution(logits, how(*way).temperature, torch.full((ROWS,), -INF))
            apart = (scaled >= lowest[:, None]) != (scaled >= least[:, None])
            assert (scaled.softmax(-1) * apart).sum(-1).max() < 1e-4  # the definition sums in float32
            alone = Draws(*(column[5:6] for column in how(*way)))
            assert sampling.draw(logits[5:6], alone)[0] == tokens[5]
        assert torch.equal(logits, before)


def test_each_row_has_its_own_way() -> None:
    logits = logits_of(1000, torch.bfloat16)
    ways = torch.tensor(WAYS)
    mixed = how()._replace(temperature=ways[:, 0], top_k=ways[:, 1].long(), top_p=ways[:, 2], min_p=ways[:, 3])
    tokens, lowest = sampling.draw(logits, mixed)
    for row, way in enumerate(WAYS):
        found, least = sampling.draw(logits, how(*way))
        assert found[row] == tokens[row] and least[row] == lowest[row]


def test_the_threshold_is_that_of_sums_in_double_precision() -> None:
    logits = logits_of(9000, torch.float32, 1)
    _, lowest = sampling.draw(logits, how(top_k=500, top_p=0.9))
    for row, least in zip(logits, lowest, strict=True):
        kept = (row - row.max()).sort(descending=True).values[:500].double()
        mass = kept.exp().cumsum(0)
        reached = int((mass < 0.9 * mass[-1]).sum())
        assert abs(int((kept.float() > least).sum()) - reached) <= 1
        assert least in kept[reached - 1 : reached + 2].float()


def test_equals_stay_together_and_the_first_of_them_wins() -> None:
    logits = torch.tensor([[0.0, 2, 1, 1, 1, 0]]).repeat(ROWS, 30)  # 180 tokens: 30 of each
    assert sampling.draw(logits, how(top_k=31))[1].tolist() == [-1] * ROWS
    assert sampling.draw(logits, how(top_p=0.8))[1].tolist() == [-1] * ROWS
    assert sampling.greedy(logits).tolist() == sampling.draw(logits, how(0))[0].tolist() == [1] * ROWS
    assert sampling.greedy(torch.full((1, 500), -2.0)).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 128, 1000])
def test_what_is_not_finite_gives_no_token(size: int, dtype: torch.dtype) -> None:
    logits = logits_of(size, dtype)
    logits[0, size - 1], logits[1, 0], logits[2], logits[3, 1:] = NAN, INF, -INF, -INF
    for way in WAYS:
        tokens = sampling.draw(logits, how(*way))[0].tolist()
        assert tokens[:4] == [-1, -1, -1, 0] and min(tokens[4:]) >= 0
    assert sampling.greedy(logits).tolist()[:4] == [-1, -1, -1, 0]
    assert torch.equal(sampling.greedy(logits)[4:], logits[4:].float().argmax(-1))


@pytest.mark.parametrize("top", [0, 3, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_logprobs(size: int, dtype: torch.dtype, top: int) -> None:
    logits, targets = logits_of(size, dtype), torch.randint(size, (ROWS,), generator=torch.Generator().manual_seed(1))
    logits[2] *= 20  # one token has all the mass
    factors = torch.linspace(0.25, 3, ROWS)
    factors[4] = 1
    plain, scaled = (sampling.token_logprobs(logits, targets, top, given) for given in (None, factors))
    for found, factor in ((plain, torch.ones(ROWS)), (scaled, factors)):
        exact = (logits.double() * factor[:, None].double()).log_softmax(-1)
        chosen, likely = exact.gather(-1, targets[:, None])[:, 0], exact.topk(min(top, size)).values
        torch.testing.assert_close(found.values.double(), chosen, rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(found.top_values.double(), likely, rtol=2e-6, atol=4e-6)
        assert torch.equal(found.ranks, 1 + (logits > logits.gather(-1, targets[:, None])).sum(-1))
        listed = logits.gather(-1, found.top_ids)
        assert torch.equal(listed, logits.topk(min(top, size)).values)
        assert all(len(set(ids)) == len(ids) for ids in found.top_ids.tolist())
    assert plain.values[4] == scaled.values[4] and torch.equal(plain.top_values[4], scaled.top_values[4])
    alone = sampling.token_logprobs(logits[7:8], targets[7:8], top, factors[7:8])
    assert all(torch.equal(one[0], rows[7]) for one, rows in zip(alone, scaled, strict=True))


def test_logprobs_of_no_token_and_of_what_is_not_finite() -> None:
    logits = logits_of(300, torch.float32)
    logits[1, 7], logits[2, 7], logits[3, 7:], logits[4] = NAN, INF, -INF, -INF
    found = sampling.token_logprobs(logits, torch.tensor([-1, 0, 0, 8, 0] + [7] * (ROWS - 5)), 10)
    expected = ops.token_logprobs.__wrapped__(logits, torch.tensor([-1, 0, 0, 8, 0] + [7] * (ROWS - 5)), 10)
    assert found.values[0] == found.ranks[0] == 0
    assert found.values[[1, 2, 4]].isnan().all() and expected.values[[1, 2, 4]].isnan().all()
    assert found.values[3] == expected.values[3] == -INF and found.ranks[3] == 8
    assert found.top_values[3].isfinite().sum() == 7
    torch.testing.assert_close(found.top_values[5:], expected.top_values[5:])


def test_rows_that_lie_apart_and_other_dtypes() -> None:
    wide, targets = logits_of(2000, torch.float32), torch.zeros(ROWS, dtype=torch.int64)
    part = wide[:, :1000]
    whole = part.contiguous()
    assert torch.equal(sampling.greedy(part), sampling.greedy(whole))
    assert torch.equal(sampling.draw(part, how())[0], sampling.draw(whole, how())[0])
    assert torch.equal(
        sampling.token_logprobs(part, targets, 0).values, sampling.token_logprobs(whole, targets, 0).values
    )
    half = whole.half()
    assert torch.equal(sampling.draw(half, how())[0], sampling.draw(half.float(), how())[0])
