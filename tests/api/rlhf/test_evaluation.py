"""The arithmetic, by hand."""

from __future__ import annotations

import base64
import math
import struct

import pytest

from tandem.server.api.rlhf import arrays, evaluation

POLICY, REFERENCE = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]),
    ],
)
def test_estimators_of_kl(estimator: evaluation.KlEstimator, expected: list[float]) -> None:
    assert evaluation.kl_of(POLICY, REFERENCE, estimator) == pytest.approx(expected)


def test_k3_of_an_impossible_token_is_a_float32() -> None:
    (large,) = evaluation.kl_of([-9999.0], [0.0], "k3")
    assert math.isfinite(struct.unpack("<f", struct.pack("<f", large))[0])


def test_estimators_of_kl_agree_on_average() -> None:
    p, q = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]
    true = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for estimator in ("k1", "k3"):  # unbiased; k2 is not
        kl = evaluation.kl_of([math.log(a) for a in p], [math.log(b) for b in q], estimator)
        assert sum(a * k for a, k in zip(p, kl, strict=True)) == pytest.approx(true)


@pytest.mark.parametrize(
    ("reward", "clip", "penalty", "expected"),
    [(2.0, None, 0.0, 2.0), (7.0, (-5.0, 5.0), 0.0, 5.0), (-7.0, (-5.0, 5.0), 1.0, -6.0), (7.0, (-1.0, 9.0), 0.5, 6.5)],
)
def test_the_last_reward(reward: float, clip: tuple[float, float] | None, penalty: float, expected: float) -> None:
    assert evaluation.last_reward(reward, clip, penalty) == expected


def test_token_rewards() -> None:
    assert evaluation.token_rewards([0.5, -1.0, 0.0], 0.1, 3.0) == pytest.approx([-0.05, 0.1, 3.0])
    assert evaluation.token_rewards([2.0], 0.5, 3.0) == [2.0]


def test_rankings() -> None:
    assert evaluation.ranking_of([0.5, 2.0, -1.0, 2.0]) == [1, 3, 0, 2]
    assert evaluation.ranking_of([1.0]) == [0]


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(1.0, 1.0, 0.5), (2.0, 0.0, 1 / (1 + math.exp(-2))), (-9e9, 9e9, 0), (9e9, -9e9, 1)],
)
def test_preferences_are_bradley_terrys(better: float, worse: float, expected: float) -> None:
    found = evaluation.preference(better, worse)
    assert found == pytest.approx(expected)
    assert found + evaluation.preference(worse, better) == pytest.approx(1)


def test_normalisation() -> None:
    assert evaluation.normalisation([1.0, 2.0, 6.0], "bias") == (3.0, 1.0)
    mean, std = evaluation.normalisation([1.0, 2.0, 6.0], "mean_std")
    scaled = [(score - mean) / std for score in (1.0, 2.0, 6.0)]
    assert sum(scaled) == pytest.approx(0) and sum(value**2 for value in scaled) / 3 == pytest.approx(1)
    assert evaluation.normalisation([2.0], "mean_std") == (2.0, 0.0)


def test_arrays() -> None:
    values = [0.1, -2.0, 3e-8]
    assert arrays.ENCODERS["json"](values) == values
    encoded = arrays.ENCODERS["b64_f32"](values)
    assert isinstance(encoded, str)
    assert struct.unpack("<3f", base64.b64decode(encoded)) == pytest.approx(values, rel=1e-7)
