"""What the models say of one sequence, and how it is worded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.request import ModelCard
from . import evaluation
from .arrays import ENCODERS
from .bodies import EvaluationBody
from .groups import Found
from .roles import Part


@dataclass(slots=True)
class Judgement:
    """Of one sequence. What is not there could not be found, or was not wanted."""

    arrays: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # by the name they are shown under
    reward: float | None = None
    raw_reward: float | None = None
    pooled_index: int | None = None
    retokenized: bool = False
    weight_versions: dict[Part, int] = field(default_factory=dict[Part, int])

    def shown(self, body: EvaluationBody) -> dict[str, Any]:
        """Null, never 0, for what was wanted and could not be found."""
        encode = ENCODERS[body.encoding]
        names = [name for name in body.want if name != "reward"]
        shown: dict[str, Any] = dict.fromkeys(names)
        shown |= {name: encode(values) for name, values in self.arrays.items()}
        if self.reward is not None or "reward" in body.want:
            shown |= {"reward": self.reward, "raw_reward": self.raw_reward, "pooled_index": self.pooled_index}
            shown["tokens"] = "retokenized" if self.retokenized else "given"
        return shown


def judged(
    body: EvaluationBody,
    cards: Mapping[Part, ModelCard],
    found: Mapping[Part, Found],
    *,
    tokens: int,
    cut: bool,
    penalty: float,
) -> Judgement:
    """`cut`: more would have followed the sequence's `tokens`. `penalty`: for a missing end-of-text token."""
    judgement = Judgement(weight_versions={part: one.weight_version for part, one in found.items()})
    logprobs = {part: found[part].logprobs for part in ("policy", "reference") if part in found}
    policy, reference = logprobs.get("policy"), logprobs.get("reference")
    arrays: dict[str, list[float] | None] = {"policy_logprobs": policy, "ref_logprobs": reference}
    if values := found["value"].values if "value" in found else None:
        arrays["values"] = values if cut and body.bootstrap_value else values[:-1]
    kl = [0.0] * tokens
    if policy is not None and reference is not None:
        arrays["kl"] = kl = evaluation.kl_of(policy, reference, body.kl_estimator)
    score = found["reward"].score if "reward" in found else None
    if score is not None:
        reward = evaluation.normalised(score, cards["reward"]) if body.normalize else score
        last = evaluation.last_reward(reward, body.reward_clip, penalty)
        judgement.reward, judgement.raw_reward = reward, score
        judgement.pooled_index = found["reward"].pooled_index
        arrays["token_rewards"] = evaluation.token_rewards(kl, body.kl_coef or 0.0, last)
    wanted = set(body.want)
    judgement.arrays = {name: array for name, array in arrays.items() if name in wanted and array is not None}
    return judgement
