"""How far a model's answers are from those of a reference.

Letters: T tokens that are measured, V vocabulary; p the reference's distribution of the next token, q the candidate's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bench.stats import percentile

UNSEEN = 1e-7  # probabilities sum to 1 up to this, in float32 and in JSON


@dataclass
class LanguageQuality:
    """Collected token by token. `exact` is false where the divergences are lower bounds."""

    exact: bool = True
    nll_reference: float = 0.0  # sums of -log p(token)
    nll_candidate: float = 0.0
    agreed: int = 0  # tokens at which both hold the same one for the most likely
    divergences: list[float] = field(default_factory=list[float])  # KL(p ‖ q) in nats, of each token

    def add(self, reference: Tensor, candidate: Tensor, targets: Tensor) -> None:
        """Logits [T, V] of both, and the tokens that came [T]."""
        p, q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
        place = targets.unsqueeze(-1)
        self.nll_reference -= float(p.gather(-1, place).double().sum())
        self.nll_candidate -= float(q.gather(-1, place).double().sum())
        self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.divergences += (p.exp() * (p - q)).sum(-1).clamp_(min=0).tolist()

    def add_top(self, reference: Mapping[int, float], candidate: Mapping[int, float], token: int) -> None:
        """Log-probabilities of the most likely tokens and of the one that came, by id: all that a server tells."""
        self.nll_reference -= reference[token]
        self.nll_candidate -= candidate[token]
        self.agreed += max(reference, key=reference.__getitem__) == max(candidate, key=candidate.__getitem__)
        self.divergences.append(least_divergence(reference, candidate))

    def figures(self) -> dict[str, float]:
        count = len(self.divergences)
        before, after = (math.exp(total / count) for total in (self.nll_reference, self.nll_candidate))
        return {
            "tokens": count,
            "perplexity_reference": before,
            "perplexity_candidate": after,
            "perplexity_change": after / before - 1,
            "kl_mean": sum(self.divergences) / count,
            "kl_p99": percentile(self.divergences, 99),
            "top1_agreement": self.agreed / count,
        }


def least_divergence(reference: Mapping[int, float], candidate: Mapping[int, float]) -> float:
    """KL(p ‖ q) is at least this: the divergence where all tokens that are not in both lists count as one."""
    both = reference.keys() & candidate.keys()
    rest_p, rest_q = (max(UNSEEN, 1 - sum(math.exp(of[token]) for token in both)) for of in (reference, candidate))
    seen = sum(math.exp(reference[token]) * (reference[token] - candidate[token]) for token in both)
    return max(0.0, seen + rest_p * math.log(rest_p / rest_q))


@dataclass
class RewardQuality:
    """The scores of both for the same texts, group by group."""

    groups: list[tuple[list[float], list[float]]] = field(default_factory=list[tuple[list[float], list[float]]])

    def add(self, reference: Sequence[float], candidate: Sequence[float]) -> None:
        self.groups.append((list(reference), list(candidate)))

    def figures(self) -> dict[str, float]:
        reference, candidate = ([score for group in self.groups for score in group[side]] for side in (0, 1))
        pairs = [pair for group in self.groups for pair in _pairs(*group)]
        return {
            "texts": len(reference),
            "pearson": correlation(reference, candidate),
            "spearman": correlation(ranks(reference), ranks(candidate)),
            "pairs": len(pairs),
            "ranking_agreement": sum(pairs) / len(pairs) if pairs else math.nan,
            "largest_difference": max(abs(a - b) for a, b in zip(reference, candidate, strict=True)),
        }


def _pairs(reference: Sequence[float], candidate: Sequence[float]) -> list[bool]:
    """Of every two texts that the reference holds for different: whether the candidate has them in the same order."""
    return [
        (reference[i] - reference[j]) * (candidate[i] - candidate[j]) > 0
        for i in range(len(reference))
        for j in range(i)
        if reference[i] != reference[j]
    ]


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; NaN where either does not vary."""
    pair = torch.tensor([x, y], dtype=torch.float64)
    return float(torch.corrcoef(pair)[0, 1]) if len(x) > 1 else math.nan


def ranks(values: Sequence[float]) -> list[float]:
    """Places in ascending order; equal values share the mean of theirs."""
    found = [0.0] * len(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for place in order[begin:end]:
            found[place] = (begin + end - 1) / 2
        begin = end
    return found
