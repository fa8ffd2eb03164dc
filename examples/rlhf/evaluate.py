"""Accuracy of the demo's checkpoints on held-out prompts: `python evaluate.py`.

Both models are loaded and run by transformers, in batches, as anyone would load them. The policy decodes greedily; the
reward model is read at the last token of the conversation. `--serve ,quantization=int8` has Tandem serve both instead,
with that behind each one's directory: what precision costs in right answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import torch
from torch import Tensor

DEMO = Path(__file__).resolve().parents[2] / "model" / "demo"
MAX_TOKENS = 72  # of an answer

Answerer = Callable[[list[str]], list[str]]  # rendered prompts -> answers
Scorer = Callable[[list[str]], list[float]]  # rendered conversations -> rewards


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int = MAX_TOKENS,
    batch: int = 64,
    temperature: float = 0.0,
) -> list[str]:
    """The answer to each rendered prompt, without its end-of-turn token; greedy at temperature 0."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.padding_side = "left"
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    for low in range(0, len(order), batch):
        rows = order[low : low + batch]
        encoded = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(
                **{name: encoded[name] for name in ("input_ids", "attention_mask")},
                max_new_tokens=max_new_tokens, max_length=None, eos_token_id=end, pad_token_id=0, **sampling,
            )  # fmt: skip
        for row, out in zip(rows, ids[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
            answers[row] = tokenizer.decode(out[: out.index(end)] if end in out else out)
    return answers


def load(directory: Path, auto: Any) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of a checkpoint, by transformers."""
    from transformers import AutoTokenizer

    return auto.from_pretrained(directory, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(directory)


def answerer(directory: Path) -> Answerer:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(directory, AutoModelForCausalLM)
    return lambda prompts: generate(model, tokenizer, prompts)


def evaluate_policy(
    directory: Path,
    count: int = 60,
    seed: int = 0,
    failures: list[Any] | None = None,
    answer: Answerer | None = None,
) -> dict[str, float]:
    """Share of right greedy answers per kind and language on `count` held-out prompts each.

    `well_formed` is the share that is word for word the well-formed answer. `failures` collects (exercise, answer).
    `answer`: instead of transformers with the checkpoint in `directory`.
    """
    cells = list(itertools.product(data.KINDS, ("en", "zh")))
    drawn = {cell: data.exercises(seed, "held_out", *cell, count) for cell in cells}
    flat = [exercise for cell in cells for exercise in drawn[cell]]
    answer = answer or answerer(directory)
    answers = dict(zip(map(id, flat), answer([e.prompt() for e in flat]), strict=True))
    right = {id(e): data.is_right(e, answers[id(e)]) for e in flat}
    if failures is not None:
        failures += [(e, answers[id(e)]) for e in flat if not right[id(e)]]
    report = {"_".join(cell): sum(right[id(e)] for e in drawn[cell]) / len(drawn[cell]) for cell in cells}
    report["well_formed"] = sum(answers[id(e)] == e.answer for e in flat) / len(flat)
    return {name: round(value, 4) for name, value in report.items()}


def score(model: Any, tokenizer: Any, texts: list[str], batch: int = 64) -> Tensor:
    """Rewards [N] of rendered conversations."""
    scores = torch.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    tokenizer.padding_side = "right"
    for low in range(0, len(order), batch):
        rows = order[low : low + batch]
        encoded = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        scores[rows] = logits[:, 0].float()
    return scores


def text_of(exercise: data.Exercise, answer: data.Answer) -> str:
    """A finished conversation as the reward model reads it; without the end-of-turn token if the answer has none."""
    return exercise.prompt() + answer.text + ("<|im_end|>" if answer.ended else "")


def scorer(directory: Path) -> Scorer:
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = load(directory, AutoModelForSequenceClassification)
    return lambda texts: score(model, tokenizer, texts).tolist()


def evaluate_reward(
    directory: Path,
    count: int = 100,
    seed: int = 0,
    failures: list[Any] | None = None,
    score_all: Scorer | None = None,
) -> dict[str, float]:
    """Share of pairs in held-out rankings in which the better answer has the higher reward, in all and per kind.

    `right_over_wrong` counts only pairs of a right and a wrong answer. `failures` collects (exercise, better, worse,
    difference). `score_all`: instead of transformers with the checkpoint in `directory`.
    """
    rankings = list(itertools.islice(data.rankings(seed, "held_out"), count))
    texts = [text_of(r.exercise, answer) for r in rankings for answer in r.answers]
    scores = iter((score_all or scorer(directory))(texts))
    won: dict[str, list[bool]] = {}
    for ranking in rankings:
        values = [next(scores) for _ in ranking.answers]
        for i, j in ranking.pairs():
            correct = ["right_over_wrong"] if ranking.grades[i] < 2 and ranking.grades[j] == 2 else []
            for name in ("pairs", ranking.exercise.kind, *correct):
                won.setdefault(name, []).append(values[i] > values[j])
            if failures is not None and values[i] <= values[j]:
                failures.append((ranking.exercise, ranking.answers[i], ranking.answers[j], values[i] - values[j]))
    return {name: round(sum(wins) / len(wins), 4) for name, wins in won.items()}


def post(http: Any, path: str, **body: Any) -> Any:
    return http.post(path, json=body).raise_for_status().json()


def served(demo: Path, settings: str, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Both evaluations, of what Tandem makes of the checkpoints with `settings` behind their directories."""
    import httpx

    from tandem.benchmarks.bench.served import tandem

    specs = [f"{name}={demo / name}{settings}" for name in ("policy", "reward")]
    with tandem(*specs) as server, httpx.Client(base_url=server.url, timeout=600) as http:

        def answer(prompts: list[str]) -> list[str]:
            wanted = {"max_tokens": MAX_TOKENS, "temperature": 0, "skip_special_tokens": False}
            parts = [post(http, "/v1/completions", model="policy", prompt=part, **wanted) for part in batches(prompts)]
            return [choice["text"].removesuffix("<|im_end|>") for part in parts for choice in part["choices"]]

        def score_all(texts: list[str]) -> list[float]:
            parts = [post(http, "/v1/rewards", model="reward", input=part) for part in batches(texts)]
            return [entry["raw_reward"] for part in parts for entry in part["data"]]

        return {
            "policy": evaluate_policy(demo / "policy", count, seed, answer=answer),
            "reward": evaluate_reward(demo / "reward", 3 * count, seed, score_all=score_all),
        }


def batches(texts: list[str], size: int = 256) -> list[list[str]]:
    return [texts[begin : begin + size] for begin in range(0, len(texts), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the demo's checkpoints on held-out prompts.")
    parser.add_argument("--demo", type=Path, default=DEMO, help="directory with policy/ and reward/")
    parser.add_argument("--count", type=int, default=100, help="prompts per kind and language, and rankings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=int, default=0, help="show this many wrong answers")
    parser.add_argument("--serve", metavar="SETTINGS", help="by Tandem, with these settings of a model, or ''")
    options = parser.parse_args()
    begun, report, failures = time.monotonic(), {}, []
    if options.serve is not None:
        report = served(options.demo, options.serve, options.count, options.seed)
        print(json.dumps({**report, "count": options.count, "seconds": round(time.monotonic() - begun, 1)}))
        return
    if (options.demo / "policy").exists():
        report["policy"] = evaluate_policy(options.demo / "policy", options.count, options.seed, failures)
    if (options.demo / "reward").exists():
        report["reward"] = evaluate_reward(options.demo / "reward", 3 * options.count, options.seed, failures)
    for failure in failures[: options.failures]:
        print(failure[0].kind, failure[0].messages[-1]["content"][-70:], *failure[1:], sep=" | ")
    print(json.dumps({**report, "count": options.count, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
