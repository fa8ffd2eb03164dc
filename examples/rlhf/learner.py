"""PPO on answers that a server sampled and scored: what each token earned, its advantage, and the two networks.

The networks are transformers' own in float32, so that their parameters bear the checkpoint's names. Answers stand
behind their prompts, padded on the right within blocks of like length; attention is causal, so nothing that counts ever
sees the padding. What counts is flat: the N answer tokens of a batch, each with the place before it, where both
networks predict.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rollouts import Sample
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

BLOCKS = 4  # of a batch, by length: what is padded costs as much as what counts
Document = tuple[list[int], list[int]]  # ids, and the positions whose next token is learnt


@dataclass(frozen=True)
class Settings:
    """Clip, λ and betas as in InstructGPT and PPO; rates for models of a few million parameters."""

    kl_coef: float = 0.03  # nats cost this much reward
    clip: float = 0.2
    lam: float = 0.95
    policy_rate: float = 2e-4
    value_rate: float = 3e-4
    epochs: int = 2
    minibatch: int = 64  # answers
    ptx: float = 0.15  # weight of the demonstrations' cross-entropy
    ptx_texts: int = 8  # demonstrations per minibatch


def token_rewards(sample: Sample, kl_coef: float) -> Tensor:
    """What each token earned [T]: the penalty for leaving the reference and, at the end, the reward.

    An answer that was cut has not ended: what it would have earned is in its bootstrap value.
    """
    rewards = -kl_coef * (sample.logprobs - sample.reference)
    if sample.ended:
        rewards[-1] += sample.reward
    return rewards


def advantages(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
    """Generalised advantage estimates [T] without discount (Schulman et al., 2016, eq. 16 with γ = 1).

    `values` [T] are those before each token of an answer that ended; [T + 1] of one that was cut.
    """
    after = torch.cat((values[1:], values.new_zeros(1)))[: len(rewards)]
    errors = rewards + after - values[: len(rewards)]
    found = torch.empty_like(errors)
    ahead = errors.new_zeros(())
    for t in reversed(range(len(errors))):
        found[t] = ahead = errors[t] + lam * ahead
    return found


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(PPO's clipped loss, share of tokens whose ratio lies outside the clip) of N tokens' log-probabilities."""
    ratio = (new - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    return loss, ((ratio - 1).abs() > clip).float().mean()


@dataclass(frozen=True)
class Batch:
    """Sequences in blocks of like length, padded, and their N tokens that count.

    `places` index the blocks' positions, flat and one block behind another: those before the tokens.
    """

    blocks: tuple[Tensor, ...]  # ids [rows, length] each
    places: Tensor  # [N]
    tokens: Tensor  # [N], sequence by sequence as they were given

    @classmethod
    def of(cls, sequences: list[list[int]], before: list[list[int]]) -> Batch:
        """`before[i]`: positions in sequence i whose next token counts."""
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        blocks, starts, flat = [], [0] * len(sequences), 0
        for part in torch.tensor(order).chunk(BLOCKS):
            rows = part.tolist()
            block = nn.utils.rnn.pad_sequence([torch.tensor(sequences[row]) for row in rows], batch_first=True)
            for line, row in enumerate(rows):
                starts[row] = flat + line * block.shape[1]
            blocks, flat = [*blocks, block], flat + block.numel()
        places = torch.tensor([start + at for start, own in zip(starts, before, strict=True) for at in own])
        return cls(tuple(blocks), places, torch.cat([block.flatten() for block in blocks])[places + 1])

    def hidden(self, model: nn.Module) -> Tensor:
        """The model's last hidden states at the places [N, D]."""
        blocks = [model(ids, use_cache=False).last_hidden_state.flatten(0, 1) for ids in self.blocks]
        return torch.cat(blocks)[self.places]


@dataclass(frozen=True)
class Lesson:
    """A sample with what PPO makes of it, all [T]."""

    sample: Sample
    advantages: Tensor
    returns: Tensor


class Learner:
    """A policy, a value function that starts as the reward model, and their optimiser."""

    def __init__(self, policy: Path, reward: Path, settings: Settings, documents: Iterator[Document]) -> None:
        """`policy` and `reward` are checkpoints; `documents` are the demonstrations for `settings.ptx`."""
        self.settings, self.documents = settings, documents
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        self.value = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        self.offset = 0.0  # what normalisation adds to the reward model's raw scores, as which the values start
        self._rates = (settings.policy_rate, settings.value_rate)
        groups = [{"params": list(model.parameters())} for model in (self.policy, self.value)]
        self._optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def logprobs(self, batch: Batch) -> Tensor:
        """The policy's log-probabilities of the tokens that count [N]."""
        logits = self.policy.lm_head(batch.hidden(self.policy.model))
        return logits.log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]

    def values(self, batch: Batch) -> Tensor:
        """What the value function expects before the tokens that count [N]."""
        return self.value.score(batch.hidden(self.value.model))[:, 0] + self.offset

    def update(self, samples: list[Sample], rate: float) -> dict[str, float]:
        """Trains on one rollout, at `rate` times the full learning rates."""
        for group, full in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * full
        lessons = self._lessons(samples)
        steps: list[dict[str, float]] = []
        for _ in range(self.settings.epochs):
            for rows in torch.randperm(len(lessons)).split(self.settings.minibatch):
                steps.append(self._step([lessons[row] for row in rows.tolist()]))
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        return {**means, "mismatch": steps[0]["mismatch"]}

    def _lessons(self, samples: list[Sample]) -> list[Lesson]:
        """Returns as they are; advantages whitened over all tokens of the rollout."""
        lessons: list[Lesson] = []
        for sample in samples:
            values = sample.values + self.offset
            own = advantages(token_rewards(sample, self.settings.kl_coef), values, self.settings.lam)
            lessons.append(Lesson(sample, own, own + values[: len(own)]))
        deviation, mean = torch.std_mean(torch.cat([lesson.advantages for lesson in lessons]))
        return [
            Lesson(lesson.sample, (lesson.advantages - mean) / (deviation + 1e-8), lesson.returns) for lesson in lessons
        ]

    def _step(self, lessons: list[Lesson]) -> dict[str, float]:
        samples = [lesson.sample for lesson in lessons]
        batch = Batch.of(
            [sample.prompt + sample.answer for sample in samples],
            [[len(sample.prompt) - 1 + t for t in range(len(sample.answer))] for sample in samples],
        )
        old = torch.cat([sample.logprobs for sample in samples])
        new = self.logprobs(batch)
        loss, clipped = policy_loss(new, old, torch.cat([x.advantages for x in lessons]), self.settings.clip)
        value_loss = F.mse_loss(self.values(batch), torch.cat([x.returns for x in lessons]))
        (loss + 0.5 * value_loss + self._ptx_loss()).backward()
        for model in (self.policy, self.value):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()
        mismatch = (new.detach() - old).abs().max()
        found = {"policy_loss": loss, "value_loss": value_loss, "clipped": clipped, "mismatch": mismatch}
        return {name: figure.item() for name, figure in found.items()}

    def _ptx_loss(self) -> Tensor | float:
        """PPO-ptx: cross-entropy of demonstrations, so that what is not rewarded is not forgotten."""
        if not self.settings.ptx:
            return 0.0
        texts = [next(self.documents) for _ in range(self.settings.ptx_texts)]
        return -self.settings.ptx * self.logprobs(Batch.of([ids for ids, _ in texts], [at for _, at in texts])).mean()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy by checkpoint name; tied weights occur once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def save_checkpoint(model: nn.Module, like: Path, directory: Path) -> None:
    """Weights in float32 with the tokenizer of the checkpoint `like`."""
    shutil.copytree(like, directory, dirs_exist_ok=True)
    model.save_pretrained(directory)
