"""PPO against a running Tandem server: `python ppo.py --minutes 10`.

The server samples, and says what all four models make of each answer; this process trains the policy and the value
function and hands their weights back. As in InstructGPT (section 3.5): a KL penalty per token towards the SFT model,
a value function that starts as the reward model, rewards that are 0 on average for demonstrations. Starts the server
itself, unless `--url` names one. Ends with one line of JSON and a picture of reward and KL per iteration.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
import torch
from evaluate import evaluate_policy
from learner import Learner, Settings, save_checkpoint, weights
from rollouts import Sample, Tandem
from sft import DEMO, Encoder, Progress
from tokenizers import Tokenizer
from transformers.utils import logging

from tandem.benchmarks.bench.served import tandem as serve

KINDS = ("arithmetic", "facts")  # what the reward model is taught to rank most, and where form has room to improve
CELLS = tuple(itertools.product(KINDS, ("en", "zh")))
BAR = {"gain": 1.0, "kl": 10.0, "accuracy": -0.02}  # in deviations of the SFT policy's rewards; nats; of 1


@dataclass(frozen=True)
class Measured:
    """What answers to held-out prompts earn, and how far the policy is from the SFT model on them."""

    reward: float
    deviation: float
    kl: float
    cut: float  # share of answers without an end

    @classmethod
    def of(cls, samples: list[Sample]) -> Measured:
        rewards = [sample.reward for sample in samples]
        kl, cut = (statistics.fmean(found) for found in zip(*((s.kl, not s.ended) for s in samples), strict=True))
        return cls(statistics.fmean(rewards), statistics.pstdev(rewards), kl, cut)


@dataclass
class Run:
    """One seed's way: what every iteration's own answers earned, and the report at its end."""

    seed: int
    rewards: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def training_exercises(seed: int) -> Iterator[data.Exercise]:
    """Without end, from the training side of every split."""
    rng = random.Random(f"{seed} ppo")
    while True:
        yield data.draw_exercise(rng, "train", *rng.choice(CELLS))


def held_out_exercises(count: int) -> list[data.Exercise]:
    """`count` of each kind and language."""
    return [exercise for cell in CELLS for exercise in data.exercises(0, "held_out", *cell, count)]


class Ids:
    """Exercises as token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prompts(self, exercises: Iterator[data.Exercise] | list[data.Exercise]) -> list[list[int]]:
        return [self.encode(exercise.prompt()) for exercise in exercises]

    def demonstrations(self, seed: int, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer) as the SFT model learnt them."""
        rng, drawn = random.Random(f"{seed} demonstrations"), itertools.islice(training_exercises(seed), count)
        return [(self.encode(e.prompt()), self.encode(data.styled(rng, e) + "<|im_end|>")) for e in drawn]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """The address of a server with the four models. It computes in float32, as this process does."""
    if options.url:
        yield options.url
        return
    models = (
        f"policy={options.out / 'policy'}",
        f"reference={options.policy},role=reference",
        f"reward={options.reward}",
        f"value={options.out / 'value'},role=value",
    )
    with serve(*models, "--dtype", "float32", "--threads", options.threads) as served:
        yield served.url


def train(options: argparse.Namespace, seed: int) -> Run:
    """One run: measures, trains for as long as leaves time to measure again, measures again."""
    torch.manual_seed(seed)
    torch.set_num_threads(options.threads)
    begun, run = time.monotonic(), Run(seed)
    tokenizer = Tokenizer.from_file(str(options.policy / "tokenizer.json"))
    ids, documents = Ids(tokenizer), Encoder(tokenizer).documents(data.conversations(seed))
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    learner = Learner(options.policy, options.reward, settings, documents)
    save_policy_and_value(learner, options)
    right_before = evaluate_policy(options.policy, options.evaluate)
    evaluating = time.monotonic() - begun
    with server(options) as url:
        tandem = Tandem(url)
        push(tandem, learner, "0")  # whatever an earlier run left there
        learner.offset = tandem.normalize(ids.demonstrations(seed, options.demonstrations))
        held_out = ids.prompts(held_out_exercises(options.held_out))
        before = Measured.of(tandem.rollout(held_out, n=options.n, max_tokens=options.max_tokens, seed=seed))
        iterate(tandem, learner, ids, options, run, end=begun + 60 * options.minutes - 1.2 * evaluating)
        after = Measured.of(tandem.rollout(held_out, n=options.n, max_tokens=options.max_tokens, seed=seed))
    save_policy_and_value(learner, options)
    right_after = evaluate_policy(options.out / "policy", options.evaluate)
    run.report = report(run, before, after, right_before, right_after)
    run.report["seconds"] = round(time.monotonic() - begun, 1)
    return run


def iterate(tandem: Tandem, learner: Learner, ids: Ids, options: argparse.Namespace, run: Run, end: float) -> None:
    """PPO's iterations until the clock says `end` or all are done: answers come from the server, weights go there."""
    progress, start, exercises = Progress(), time.monotonic(), training_exercises(run.seed)
    done = 0.0
    while done < 1:
        number = len(run.rewards) + 1
        prompts = ids.prompts(itertools.islice(exercises, options.prompts))
        seed = 1000 * run.seed + number
        samples = tandem.rollout(prompts, n=options.n, max_tokens=options.max_tokens, seed=seed)
        found = learner.update(samples, rate=min(1.0, 2 * (1 - done)))  # full at first, then linearly to 0
        push(tandem, learner, str(number))
        now = Measured.of(samples)
        run.rewards.append(now.reward)
        run.kls.append(now.kl)
        done = max((time.monotonic() - start) / max(end - start, 1.0), number / (options.iterations or math.inf))
        progress.show(
            done,
            f"iteration {number} reward {now.reward:.3f} kl {now.kl:.2f} cut {now.cut:.3f} clipped "
            f"{found['clipped']:.3f} value loss {found['value_loss']:.3f} mismatch {found['mismatch']:.1e}",
        )


def push(tandem: Tandem, learner: Learner, version: str) -> None:
    tandem.push("policy", weights(learner.policy), version)
    tandem.push("value", weights(learner.value), version)


def save_policy_and_value(learner: Learner, options: argparse.Namespace) -> None:
    save_checkpoint(learner.policy, options.policy, options.out / "policy")
    save_checkpoint(learner.value, options.reward, options.out / "value")


def report(
    run: Run, before: Measured, after: Measured, right_before: dict[str, float], right_after: dict[str, float]
) -> dict[str, Any]:
    """The figures of a run and whether they meet the bar. Accuracy is the mean over kinds and languages."""
    cells = [name for name in right_before if name != "well_formed"]
    accuracy = [statistics.fmean(right[cell] for cell in cells) for right in (right_before, right_after)]
    gain = (after.reward - before.reward) / before.deviation
    met = gain >= BAR["gain"] and after.kl <= BAR["kl"] and accuracy[1] - accuracy[0] >= BAR["accuracy"]
    return {
        "seed": run.seed,
        "iterations": len(run.rewards),
        "reward_before": round(before.reward, 3),
        "reward_after": round(after.reward, 3),
        "deviation": round(before.deviation, 3),
        "gain": round(gain, 3),
        "kl": round(after.kl, 6),
        "cut_before": round(before.cut, 4),
        "cut_after": round(after.cut, 4),
        "accuracy_before": round(accuracy[0], 4),
        "accuracy_after": round(accuracy[1], 4),
        "kinds": {name: [right_before[name], right_after[name]] for name in right_before},
        "met": met,
    }


def draw(runs: list[Run], path: Path) -> None:
    """Reward and KL of every iteration's own answers, a line per seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for run in runs:
        left.plot(run.rewards, label=f"seed {run.seed}", linewidth=1)
        right.plot(run.kls, linewidth=1)
    left.axhline(0, color="grey", linestyle=":", label="demonstrations")
    left.set(xlabel="iteration", ylabel="mean reward, normalised")
    right.set(xlabel="iteration", ylabel="KL to the SFT model, nats per answer", ylim=(0, None))
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Improve the demo's policy by PPO against a Tandem server.")
    parser.add_argument("--url", help="a running server with models named policy, reference, reward and value")
    parser.add_argument("--policy", type=Path, default=DEMO / "policy", help="SFT checkpoint: start and reference")
    parser.add_argument("--reward", type=Path, default=DEMO / "reward", help="judge, and the first value model")
    parser.add_argument("--out", type=Path, default=Path(".run/ppo"), help="gets policy/, value/ and the picture")
    parser.add_argument("--plot", type=Path, help="the picture; None: OUT/ppo.png")
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="several: one run after the other")
    parser.add_argument("--minutes", type=float, default=10.0, help="of one run, both evaluations included")
    parser.add_argument("--iterations", type=int, help="end after this many, if time allows")
    parser.add_argument("--threads", type=int, default=2, help="of the server and of this process, which take turns")
    parser.add_argument("--prompts", type=int, default=64, help="per iteration")
    parser.add_argument("--n", type=int, default=4, help="answers per prompt")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--demonstrations", type=int, default=256, help="whose mean reward becomes 0")
    parser.add_argument("--held-out", type=int, default=50, help="prompts per kind and language for the reward")
    parser.add_argument("--evaluate", type=int, default=100, help="prompts per kind and language for the accuracy")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="see learner.Settings")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that ends within a minute")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.threads, options.minutes, options.iterations, options.prompts = 1, 5.0, 2, 4
        options.demonstrations, options.held_out, options.evaluate = 8, 2, 2
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.disable_progress_bar()  # of transformers' loading and saving
    runs = [train(options, seed) for seed in options.seed]
    draw(runs, options.plot or options.out / "ppo.png")
    reports = [run.report for run in runs]
    print(json.dumps(reports[0] if len(runs) == 1 else {"runs": reports, "met": all(r["met"] for r in reports)}))


if __name__ == "__main__":
    main()
