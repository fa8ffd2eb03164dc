"""Trains the demo's reward model on rankings of K = 4…9 answers: `python reward.py --minutes 15`.

Starts from the policy's trunk with a linear head read at the last token. All pairs of a prompt are in one batch and
weigh as one (InstructGPT, eq. 1): loss = -1 / pairs · Σ log σ(r_better - r_worse); answers of one grade are no pair.
Some rankings hold answers that the policy itself sampled, put in order by the checker. Pairs of answers that are hard
to tell apart come on top. Writes a `LlamaForSequenceClassification` with one label.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from evaluate import evaluate_reward, generate, load, text_of
from safetensors.torch import load_file
from sft import (
    CONTEXT,
    DEMO,
    FAST,
    Encoder,
    Optimiser,
    Progress,
    Trunk,
    flatten,
    hf_config,
    load_policy,
    save_tokenizer,
    save_weights,
    schedule,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Reward(nn.Module):
    """A trunk and a score; forward gives one score per sequence, read at its last token."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.model = trunk
        self.score = nn.Linear(trunk.shape.hidden, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.doubt = nn.Linear(trunk.shape.hidden, 1, bias=False)  # for training only: where an answer goes wrong

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(score of each sequence, doubt at each place of `batch.turns`, mean cross-entropy of the batch's texts)."""
        flat = flatten(batch.sequences)
        hidden = self.model(flat)
        ends = [(index, len(ids) - 1) for index, ids in enumerate(batch.sequences)]
        scored, turned, told = (
            torch.tensor([flat.starts[index] + position for index, position in places], dtype=torch.long)
            for places in (ends, batch.turns, batch.texts)
        )
        logits = hidden[told] @ self.model.embed_tokens.weight.T  # [texts, V]
        text_loss = F.cross_entropy(logits.float(), flat.ids[told + 1])
        return self.score(hidden[scored])[:, 0].float(), self.doubt(hidden[turned])[:, 0].float(), text_loss


def scale_loss(scores: Tensor, batch: Batch, anchor: float, tie: float) -> Tensor:
    """What pairs leave open: where a prompt's scores lie, and how far apart equals are.

    Well-formed answers are drawn to 0 whatever the prompt, so that rewards of different prompts can be compared, and
    right answers of one grade to each other, so that a reward's deviation is of quality and not of taste.
    """
    left, right = torch.tensor(batch.ties, dtype=torch.long).reshape(-1, 2).T
    apart = (scores[left] - scores[right]).square().sum() / max(1, len(batch.ties))
    return anchor * scores[batch.wanted].square().mean() + tie * apart


def ranking_loss(scores: Tensor, pairs: list[list[tuple[int, int]]]) -> Tensor:
    """Mean over prompts of the mean over a prompt's pairs (better, worse) of -log σ(r_better - r_worse)."""
    losses = []
    for own in pairs:
        better, worse = torch.tensor(own).T
        losses.append(-F.logsigmoid(scores[better] - scores[worse]).mean())
    return torch.stack(losses).mean()


@dataclass
class Batch:
    """Sequences, and per prompt the pairs (better, worse) of them.

    Besides rankings there are close pairs of answers: they are compared at their ends and, by a head of its own that is
    thrown away, at the first token that differs, which tells the trunk what was wrong. (The score itself must not be
    high there: an answer that has not ended is garbage.) The best answers are also learnt as text, so that the trunk
    does not forget what is true while it learns what is liked.
    """

    sequences: list[list[int]] = field(default_factory=list)
    pairs: list[list[tuple[int, int]]] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)  # (sequence, position): right, wrong, right, wrong …
    texts: list[tuple[int, int]] = field(default_factory=list)  # (sequence, position before a token of a best answer)
    wanted: list[int] = field(default_factory=list)  # sequences whose answer is the well-formed one
    ties: list[tuple[int, int]] = field(default_factory=list)  # sequences that are about equally good

    def add_ranking(self, encoder: Encoder, ranking: data.Ranking) -> None:
        texts = [text_of(ranking.exercise, answer) for answer in ranking.answers]
        encoded = [encoding.ids for encoding in encoder.tokenizer.encode_batch(texts)]
        if max(map(len, encoded)) > CONTEXT:
            return
        first = len(self.sequences)
        if ranking.grades[0] == 0:
            self._learn(encoder, encoded[0])
            self.wanted.append(first)
        self.sequences += encoded
        self.pairs.append([(first + i, first + j) for i, j in ranking.pairs()])
        self.ties += [(first + i, first + j) for i, j in ranking.ties()]

    def add_pair(self, encoder: Encoder, exercise: data.Exercise, better: str, worse: str) -> None:
        texts = [text_of(exercise, data.Answer(text)) for text in (better, worse)]
        good, bad = (encoding.ids for encoding in encoder.tokenizer.encode_batch(texts))
        differs = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), None)
        if differs is None or max(len(good), len(bad)) > CONTEXT:
            return
        self._learn(encoder, good)
        first = len(self.sequences)
        if better == exercise.answer:
            self.wanted.append(first)
        self.sequences += [good, bad]
        self.pairs.append([(first, first + 1)])
        self.turns += [(first, differs), (first + 1, differs)]

    def _learn(self, encoder: Encoder, ids: list[int]) -> None:
        """The next sequence, `ids`, is one whose answers are learnt."""
        self.texts += [(len(self.sequences), position) for position in encoder.targets(ids)]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


class Batches(IterableDataset[Batch]):
    """Batches without end, made in a process of their own beside the training."""

    def __init__(self, tokenizer: Tokenizer, sampled: list[tuple[data.Exercise, list[str]]], options: Any) -> None:
        super().__init__()
        self.tokenizer, self.sampled, self.options = tokenizer, sampled, options

    def __iter__(self) -> Iterator[Batch]:
        options, encoder = self.options, Encoder(self.tokenizer)
        stream, rng = (
            rankings(self.sampled, options.sampled_share, options.seed),
            random.Random(f"{options.seed} pairs"),
        )
        while True:
            batch = Batch()
            while batch.tokens < options.batch_tokens:
                batch.add_ranking(encoder, next(stream))
                for _ in range(options.close_pairs):
                    batch.add_pair(encoder, *data.close_pair(rng, "train"))
            yield batch


def save_reward(reward: Reward, tokenizer: Tokenizer, directory: Path) -> None:
    """The checkpoint that `AutoModelForSequenceClassification` and `AutoTokenizer` load."""
    save_tokenizer(tokenizer, directory)
    architecture = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "problem_type": "regression"}
    hf_config(reward.model.shape, **architecture).save_pretrained(directory)
    save_weights({name: tensor for name, tensor in reward.state_dict().items() if "doubt" not in name}, directory)


def sample(directory: Path, prompts: int, seed: int, temperature: float) -> list[tuple[data.Exercise, list[str]]]:
    """Training exercises with six answers each that the policy sampled."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(directory, AutoModelForCausalLM)
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} samples")
    drawn = [
        data.draw_exercise(rng, "train", rng.choices(("arithmetic", "facts", "chat"), (50, 35, 15))[0])
        for _ in range(prompts)
    ]
    texts = [exercise.prompt() for exercise in drawn for _ in range(6)]
    answers = generate(model, tokenizer, texts, max_new_tokens=32, batch=256, temperature=temperature)
    return [(exercise, answers[6 * i : 6 * i + 6]) for i, exercise in enumerate(drawn)]


def rankings(sampled: list[tuple[data.Exercise, list[str]]], share: float, seed: int) -> Iterator[data.Ranking]:
    """Generated rankings; a `share` of them rank sampled answers."""
    rng = random.Random(f"{seed} reward")
    generated = data.rankings(seed, "train")
    while True:
        if sampled and rng.random() < share:
            exercise, answers = rng.choice(sampled)
            yield data.rank(rng, exercise, "train", answers)
        else:
            yield next(generated)


def train(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    if not options.policy.exists():
        raise SystemExit(f"no policy at {options.policy}: run sft.py first, or name one with --policy")
    trunk, tokenizer = load_policy(options.policy)
    reward = Reward(trunk)
    if options.resume:
        weights = load_file(options.out / "model.safetensors")
        reward.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    print(json.dumps({"parameters": sum(p.numel() for p in reward.parameters())}), file=sys.stderr)
    sampled = sample(options.policy, options.samples, options.seed, options.temperature) if options.samples else []
    batches = iter(DataLoader(Batches(tokenizer, sampled, options), batch_size=None, num_workers=1, prefetch_factor=8))
    optimiser = Optimiser(reward, options.muon_rate, options.adam_rate)
    budget, progress, saved = options.minutes * 60, Progress(), time.monotonic()
    step, tokens, smooth, agreed, start = 0, 0, math.nan, math.nan, time.monotonic()
    while (spent := time.monotonic() - start) < budget:
        batch = next(batches)
        with torch.autocast("cpu", FAST, enabled=FAST is torch.bfloat16):
            scores, doubts, text_loss = reward(batch)
        loss = ranking_loss(scores, batch.pairs)
        turn_loss = -F.logsigmoid(doubts[1::2] - doubts[0::2]).mean()
        scale = scale_loss(scores, batch, options.anchor, options.tie)
        (loss + turn_loss + options.text_weight * text_loss + scale).backward()
        optimiser.step(schedule(spent / budget))
        step, tokens = step + 1, tokens + batch.tokens
        flat = scores.detach().tolist()
        won = [flat[i] > flat[j] for own in batch.pairs for i, j in own]
        value, share = loss.item(), sum(won) / len(won)
        smooth, agreed = (
            new if math.isnan(old) else 0.97 * old + 0.03 * new for old, new in ((smooth, value), (agreed, share))
        )
        progress.show(
            spent / budget, f"step {step} loss {smooth:.4f} pairs {agreed:.4f} {tokens / max(spent, 1e-9):.0f} tok/s"
        )
        if time.monotonic() - saved > 60 * options.save_minutes:
            saved = time.monotonic()
            save_reward(reward, tokenizer, options.out)
    save_reward(reward, tokenizer, options.out)
    report = {"steps": step, "tokens": tokens, "loss": round(smooth, 4), "seconds": round(time.monotonic() - begun, 1)}
    if options.evaluate:
        report["held_out"] = evaluate_reward(options.out, count=options.evaluate)
    return report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's reward model.")
    parser.add_argument("--policy", type=Path, default=DEMO / "policy", help="checkpoint the trunk comes from")
    parser.add_argument("--out", type=Path, default=DEMO / "reward", help="checkpoint directory")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="training time after sampling; the learning rate follows it"
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--samples", type=int, default=400, help="prompts the policy answers six times before training; 0: none"
    )
    parser.add_argument("--sampled-share", type=float, default=0.3, help="share of rankings that hold sampled answers")
    parser.add_argument("--temperature", type=float, default=1.2, help="of those samples")
    parser.add_argument("--close-pairs", type=int, default=1, help="pairs that are hard to tell apart, per ranking")
    parser.add_argument("--text-weight", type=float, default=0.3, help="of the loss of the best answers as text")
    parser.add_argument("--anchor", type=float, default=0.1, help="of the squared scores of well-formed answers")
    parser.add_argument("--tie", type=float, default=0.1, help="of the squared difference of answers of one grade")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--muon-rate", type=float, default=0.015)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--resume", action="store_true", help="start from the weights in --out instead of the policy's")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out rankings at the end; 0: none")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that ends within a minute")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.minutes, options.samples, options.evaluate = 0.15, 8, 8
    return options


def main(arguments: list[str] | None = None) -> None:
    print(json.dumps(train(parse(arguments))))


if __name__ == "__main__":
    main()
