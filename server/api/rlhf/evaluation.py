"""The arithmetic of PPO's inputs, on lists of floats: KL estimators, token rewards, rankings, normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...engine.request import ModelCard

KlEstimator = Literal["k1", "k2", "k3"]
NormalizeMode = Literal["bias", "mean_std"]

LARGEST_EXPONENT = 80.0  # of e, so that k3 stays a float32


def kl_of(policy: Sequence[float], reference: Sequence[float], estimator: KlEstimator) -> list[float]:
    """Per token, with d = log π(token) - log π_ref(token): k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d
    (Schulman, "Approximating KL divergence", 2020)."""
    differences = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    if estimator == "k1":
        return differences
    if estimator == "k2":
        return [0.5 * d * d for d in differences]
    return [math.exp(min(-d, LARGEST_EXPONENT)) - 1.0 + d for d in differences]


def last_reward(reward: float, clip: tuple[float, float] | None, penalty: float) -> float:
    """What a sequence's end is rewarded with: the reward within `clip`, less the penalty for a missing end."""
    return (reward if clip is None else min(max(reward, clip[0]), clip[1])) - penalty


def token_rewards(kl: Sequence[float], coefficient: float, last: float) -> list[float]:
    """-coefficient · kl per token, and `last` on top at the last one (InstructGPT, eq. 2, as TRL and OpenRLHF do)."""
    rewards = [-coefficient * value for value in kl]
    rewards[-1] += last
    return rewards


def ranking_of(scores: Sequence[float]) -> list[int]:
    """Indices, the highest score first; the earlier one of equals first."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def preference(better: float, worse: float) -> float:
    """Bradley-Terry: the probability that the first is preferred, σ(better - worse)."""
    difference = better - worse
    if difference >= 0:
        return 1.0 / (1.0 + math.exp(-difference))
    return math.exp(max(difference, -700.0)) / (1.0 + math.exp(difference))


def normalisation(scores: Sequence[float], mode: NormalizeMode) -> tuple[float, float]:
    """(mean, std) such that (score - mean) / std has mean 0 over these scores and, with `mean_std`, variance 1.

    std is the population's; it may be 0.
    """
    mean = math.fsum(scores) / len(scores)
    if mode == "bias":
        return mean, 1.0
    return mean, math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))


def normalised(score: float, card: ModelCard) -> float:
    """As the model's card says."""
    return (score - card.reward_mean) / card.reward_std
