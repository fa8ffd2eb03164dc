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


class Reward(nn.Module):
    """A trunk and a score; forward gives one score per sequence, read at its last token."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.model = trunk
        self.score = nn.Linear(trunk.shape.hidden, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, sequences: list[list[int]], places: list[tuple[int, int]] | None = None) -> Tensor:
        """The score of each sequence; with `places` at each (sequence, position) of those instead."""
        flat = flatten(sequences)
        if places is None:
            places = [(index, len(ids) - 1) for index, ids in enumerate(sequences)]
        at = torch.tensor([flat.starts[index] + position for index, position in places])
        return self.score(self.model(flat)[at])[:, 0]


def ranking_loss(scores: Tensor, pairs: list[list[tuple[int, int]]]) -> Tensor:
    """Mean over prompts of the mean over a prompt's pairs (better, worse) of -log σ(r_better - r_worse)."""
    losses = []
    for own in pairs:
        better, worse = torch.tensor(own).T
        losses.append(-F.logsigmoid(scores[better] - scores[worse]).mean())
    return torch.stack(losses).mean()


@dataclass
class Batch:
    """Sequences, where they are read, and per prompt the pairs (better, worse) of those places.

    Besides rankings there are close pairs of answers: they are compared at their ends and already at the first token
    that differs, which tells the model what was wrong.
    """

    sequences: list[list[int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    pairs: list[list[tuple[int, int]]] = field(default_factory=list)

    def add_ranking(self, tokenizer: Tokenizer, ranking: data.Ranking) -> None:
        encoded = [e.ids for e in tokenizer.encode_batch([text_of(ranking.exercise, a) for a in ranking.answers])]
        if max(map(len, encoded)) > CONTEXT:
            return
        first = len(self.places)
        self.places += [(len(self.sequences) + index, len(ids) - 1) for index, ids in enumerate(encoded)]
        self.sequences += encoded
        self.pairs.append([(first + i, first + j) for i, j in ranking.pairs()])

    def add_pair(self, tokenizer: Tokenizer, exercise: data.Exercise, better: str, worse: str) -> None:
        texts = [text_of(exercise, data.Answer(text)) for text in (better, worse)]
        good, bad = (e.ids for e in tokenizer.encode_batch(texts))
        differs = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), None)
        if differs is None or max(len(good), len(bad)) > CONTEXT:
            return
        place, sequence = len(self.places), len(self.sequences)
        self.sequences += [good, bad]
        self.places += [
            (sequence, differs),
            (sequence + 1, differs),
            (sequence, len(good) - 1),
            (sequence + 1, len(bad) - 1),
        ]
        self.pairs += [[(place, place + 1)], [(place + 2, place + 3)]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def save_reward(reward: Reward, tokenizer: Tokenizer, directory: Path) -> None:
    """The checkpoint that `AutoModelForSequenceClassification` and `AutoTokenizer` load."""
    save_tokenizer(tokenizer, directory)
    architecture = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "problem_type": "regression"}
    hf_config(reward.model.shape, **architecture).save_pretrained(directory)
    save_weights(reward.state_dict(), directory)


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
        reward.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    print(json.dumps({"parameters": sum(p.numel() for p in reward.parameters())}), file=sys.stderr)
    sampled = sample(options.policy, options.samples, options.seed, options.temperature) if options.samples else []
    stream = rankings(sampled, options.sampled_share, options.seed)
    rng = random.Random(f"{options.seed} pairs")
    optimiser = Optimiser(reward, options.muon_rate, options.adam_rate)
    budget, progress, saved = options.minutes * 60, Progress(), time.monotonic()
    step, tokens, smooth, agreed, start = 0, 0, math.nan, math.nan, time.monotonic()
    while (spent := time.monotonic() - start) < budget:
        batch = Batch()
        while batch.tokens < options.batch_tokens:
            batch.add_ranking(tokenizer, next(stream))
            batch.add_pair(tokenizer, *data.close_pair(rng, "train"))
        scores = reward(batch.sequences, batch.places)
        loss = ranking_loss(scores, batch.pairs)
        loss.backward()
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
