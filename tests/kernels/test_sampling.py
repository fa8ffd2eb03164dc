"""The draw of tokens: the generator against its published vectors, draws against softmax, filters against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.kernels import sampling


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


# Known answers of Philox-4x32-10 that the authors publish with Random123 (kat_vectors): counter, key, result.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected) -> None:
    got = sampling.philox(words(*counter).reshape(4, 1, 1), words(key[0] | key[1] << 32))
    assert tuple(got[0, 0].tolist()) == expected


def test_philox_rows_and_counters_are_independent() -> None:
    counter = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5), np.uint64)
    seeds = np.random.default_rng(1).integers(0, 2**64, 3, np.uint64)
    together = sampling.philox(counter, seeds)
    for row in range(3):
        for column in range(5):
            alone = sampling.philox(counter[:, row : row + 1, column : column + 1], seeds[row : row + 1])
            assert (together[row, column] == alone[0, 0]).all()


def test_draws_is_the_documented_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word w comes from counter (w // 4, position, choice, 0); its extremes stay finite and above zero."""
    seen = {}

    def fake(counter: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        seen["counter"] = counter
        result = np.zeros((1, counter.shape[2], 4), np.uint64)
        result[0, 0] = words(0, 0xFFFFFFFF, 0x80000000, 12345)
        return result

    monkeypatch.setattr(sampling, "philox", fake)
    noise = sampling.draws(words(9), words(3), words(7), 2 * sampling.LANES)
    assert noise.shape == (1, 2 + sampling.LANES)
    assert seen["counter"][:, 0, 5].tolist() == [5, 7, 3, 0]
    expected = [2.0**-33, -math.log(2.0**-24), math.log(2), (12345.5) * 2.0**-32]
    assert noise[0, :4].tolist() == pytest.approx(expected, rel=1e-5)


def scaled_by(logits: Tensor, temperature: float = 1.0) -> Tensor:
    scaled = logits.clone()
    assert sampling.scale(scaled, torch.full((len(logits),), temperature)).all()
    return scaled


def draw(logits: Tensor, count: int, seed: int = 5) -> Tensor:
    """`count` draws from one row of logits, at positions 0, 1, 2 ..."""
    scaled = scaled_by(logits.expand(count, -1))
    place = np.arange(count, dtype=np.uint64)
    noise = sampling.draws(np.full(count, seed, np.uint64), np.zeros(count, np.uint64), place, logits.shape[-1])
    return sampling.gumbel_max(scaled, noise)


@pytest.mark.parametrize("vocab_size", [1, 5, 128, 129, 1000])
def test_draws_follow_the_softmax(vocab_size: int) -> None:
    """Chi-square over tokens expected at least 8 times; the rest is one class. Fixed seed, limit at p = 1e-4."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    count = 20_000
    expected = logits.double().softmax(-1) * count
    observed = torch.cat([draw(logits, 5000, seed) for seed in range(4)]).bincount(minlength=vocab_size).double()
    common = expected >= 8
    classes = torch.cat((expected[common], expected[~common].sum()[None]))
    found = torch.cat((observed[common], observed[~common].sum()[None]))
    keep = classes >= 1
    statistic = float(((found - classes)[keep].square() / classes[keep]).sum())
    freedom = max(int(keep.sum()) - 1, 1)
    # Wilson and Hilferty: chi-square / freedom is nearly normal in its cube root.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 3.72, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def test_two_stage_draw_is_the_full_gumbel_maximum() -> None:
    """The token maximises its group's perturbed mass, then its own inside the group: checked token by token."""
    vocab_size, rows = 300, 50
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    scaled = scaled_by(logits, 0.7)
    place = np.arange(rows, dtype=np.uint64)
    noise = sampling.draws(place + np.uint64(3), place, place, vocab_size)
    got = sampling.gumbel_max(scaled, noise)
    gumbel = -noise.double().log()
    for row in range(rows):
        parts = scaled[row].double().split(sampling.LANES)
        masses = torch.stack([part.logsumexp(-1) for part in parts]) + gumbel[row, : len(parts)]
        group = int(masses.argmax())
        inside = parts[group] + gumbel[row, len(parts) : len(parts) + len(parts[group])]
        assert int(got[row]) == group * sampling.LANES + int(inside.argmax())


def test_what_is_below_the_threshold_is_never_drawn() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2))
    scaled = scaled_by(logits.expand(3000, -1))
    place = np.arange(3000, dtype=np.uint64)
    noise = sampling.draws(place, place, place, 300)
    lowest = scaled[0].topk(9).values[-1].expand(3000)
    drawn = sampling.gumbel_max(scaled, noise, lowest)
    assert set(drawn.tolist()) == set(logits.topk(9).indices.tolist())


def test_masked_tokens_are_never_drawn_and_rows_stand_alone() -> None:
    logits = torch.zeros(400)
    logits[torch.arange(400) % 7 != 0] = -torch.inf
    drawn = draw(logits, 2000)
    assert (drawn % 7 == 0).all() and len(drawn.unique()) == 58
    only = torch.full((400,), -torch.inf)
    only[399] = -3.0
    assert (draw(only, 50) == 399).all()
    # other rows of a batch change nothing
    many = torch.randn(64, 400, generator=torch.Generator().manual_seed(1))
    scaled = scaled_by(many)
    row = np.arange(64, dtype=np.uint64)
    noise = sampling.draws(row, row, row, 400)
    together = sampling.gumbel_max(scaled, noise)
    alone = [int(sampling.gumbel_max(scaled[i : i + 1], noise[i : i + 1])) for i in range(64)]
    assert together.tolist() == alone


def test_greedy_takes_the_lowest_of_equals_and_refuses_what_is_not_finite() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [-torch.inf] * 3, [0.0, torch.inf, 0.0]])
    assert sampling.greedy(logits).tolist() == [1, -1, -1, -1]
    assert sampling.scale(logits, torch.ones(4)).tolist() == [True, False, False, False]


def kept(logits: Tensor, k: int = 0, p: float = 1.0, m: float = 0.0) -> list[int]:
    scaled = scaled_by(logits[None])
    lowest = sampling.thresholds(scaled, torch.tensor([k]), torch.tensor([p]), torch.tensor([m]))
    return (scaled[0] >= lowest).nonzero()[:, 0].tolist()


def by_hand(logits: Tensor, k: int, p: float, m: float) -> list[int]:
    """The same three filters one after another, token by token, in double precision."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    if 0 < k < len(logits):
        order = [i for i in order if logits[i] >= logits[order[k - 1]]]
    weights = [math.exp(float(logits[i]) - float(logits[order[0]])) for i in order]
    if p < 1:
        total, mass = sum(weights), 0.0
        for place, weight in enumerate(weights):
            mass += weight
            if mass >= p * total:
                order = [i for i in order if logits[i] >= logits[order[place]]]
                break
    return sorted(i for i in order if math.exp(float(logits[i]) - float(logits[order[0]])) >= m)


@pytest.mark.parametrize("vocab_size", [3, 50, 900])
def test_filters_keep_what_the_definition_keeps(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for k, p, m in [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (vocab_size, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.97, 0.0),
                    (0, 1e-6, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.05), (2, 0.99, 0.3), (0, 0.9999, 0.0)]:  # fmt: skip
        for spread in (0.1, 3.0):
            logits = torch.randn(vocab_size, generator=generator) * spread
            assert kept(logits, k, p, m) == by_hand(logits, k, p, m), (k, p, m, spread)


def test_filters_agree_with_transformers_where_no_two_are_equal() -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(3)) * 2
    empty = torch.zeros(6, 0, dtype=torch.int64)
    scaled = scaled_by(logits)
    lowest = sampling.thresholds(scaled, torch.full((6,), 40), torch.full((6,), 0.8), torch.full((6,), 0.03))
    theirs = TopPLogitsWarper(0.8)(empty, TopKLogitsWarper(40)(empty, logits))
    theirs = MinPLogitsWarper(0.03)(empty, theirs)
    assert torch.equal(scaled >= lowest[:, None], theirs.isfinite())


def test_equals_stay_together() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert kept(logits, k=2) == [0, 1, 2, 3]
    assert kept(logits, p=0.6) == [0, 1, 2, 3]
    assert kept(logits, m=math.exp(-1) * 0.999) == [0, 1, 2, 3]


def test_rows_with_different_filters_do_not_mix() -> None:
    logits = torch.randn(5, 600, generator=torch.Generator().manual_seed(4))
    rows = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.2), (300, 0.3, 0.01)]
    scaled = scaled_by(logits)
    k, p, m = (torch.tensor(column) for column in zip(*rows, strict=True))
    lowest = sampling.thresholds(scaled, k, p, m)
    for row, parameters in enumerate(rows):
        assert (scaled[row] >= lowest[row]).nonzero()[:, 0].tolist() == kept(logits[row], *parameters)


def test_penalties_are_openais_and_transformers() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, vocab_size, width = 6, 40, 30
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    ids = torch.randint(0, vocab_size, (rows, width), generator=generator)
    lengths = torch.tensor([30, 1, 12, 30, 20, 9])
    prompts = torch.tensor([10, 1, 12, 0, 19, 4])
    repetition = torch.tensor([1.0, 1.7, 0.6, 1.3, 2.0, 1.0])
    presence = torch.tensor([0.5, 0.5, 0.5, -1.0, 0.0, 0.0])
    frequency = torch.tensor([0.0, 1.0, 0.0, 0.3, -0.7, 2.0])
    expected = logits.clone()
    for row in range(rows):
        history = ids[row, : lengths[row]]
        processor = RepetitionPenaltyLogitsProcessor(float(repetition[row]))
        expected[row] = processor(history[None], logits[row : row + 1])[0]
        for token in range(vocab_size):
            count = int((history[prompts[row] :] == token).sum())
            expected[row, token] -= count * frequency[row] + (count > 0) * presence[row]
    sampling.penalise(logits, ids, lengths, prompts, repetition, presence, frequency)
    torch.testing.assert_close(logits, expected)
