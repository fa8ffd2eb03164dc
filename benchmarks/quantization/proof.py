"""What quantizing costs on the bundled models, and that vLLM reads what is written: `make evidence-quantization`.

The last line is JSON; bars that were missed stand in `missed`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...model.load import load_model
from ...model.reading import read_texts
from ...server.engine.options import DEMO, EngineOptions
from ..peers.checkpoint import FIRST_WORD, checkpoint
from . import vllm_check
from .local import LocalModel, compare
from .texts import read_examples

ROOT = Path(__file__).resolve().parents[2]
# Settings, what perplexity may change by, and at how many tokens at least the most likely one must be the same.
POLICIES = (
    ("quantization=int8", 0.01, 0.99),
    ("quantization=int8,kv_dtype=int8", 0.01, 0.99),
    ("quantization=w8a8", 0.03, 0.97),
    ("quantization=w8a8,kv_dtype=int8", 0.03, 0.97),
)
RANKING = 0.99  # of a reward model's pairs
ACCURACY = 0.01  # of a kind's answers
RANDOM = "random:125m"
ROWS = (64, 8)  # tokens of a text, texts, for the logits of random weights


class Bar(NamedTuple):
    name: str
    figure: float
    met: bool


def quality() -> Iterator[tuple[str, dict[str, float], list[Bar]]]:
    """Settings, figures and bars of each model, beside bfloat16."""
    examples, options = read_examples(None), EngineOptions(device="cpu")
    policy, reward = (str(DEMO / name) for name in ("policy", "reward"))
    plain = {path: LocalModel(path, options) for path in (policy, reward)}
    for settings, change, agreement in POLICIES:
        found = compare(
            plain[policy], LocalModel(f"{policy},{settings}", options), examples, lambda done: None
        ).figures()
        bars = [
            Bar("perplexity_change", found["perplexity_change"], abs(found["perplexity_change"]) <= change),
            Bar("top1_agreement", found["top1_agreement"], found["top1_agreement"] >= agreement),
        ]
        yield f"policy,{settings}", found, bars
        found = compare(
            plain[reward], LocalModel(f"{reward},{settings}", options), examples, lambda done: None
        ).figures()
        yield (
            f"reward,{settings}",
            found,
            [Bar("ranking_agreement", found["ranking_agreement"], found["ranking_agreement"] >= RANKING)],
        )


def accuracy(settings: str, count: int) -> dict[str, Any]:
    """Of both models as Tandem serves them with these settings: what examples/rlhf/evaluate.py finds."""
    command = ["examples/rlhf/evaluate.py", "--serve", settings and f",{settings}", "--count", str(count)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def by_kind(found: dict[str, Any]) -> dict[str, float]:
    """Share of right answers, both languages together, and the reward model's ordered pairs."""
    cells = {name: value for name, value in found["policy"].items() if name != "well_formed"}
    kinds = sorted({name.rpartition("_")[0] for name in cells})
    return {kind: (cells[f"{kind}_en"] + cells[f"{kind}_zh"]) / 2 for kind in kinds} | {
        "reward pairs": found["reward"]["pairs"]
    }


def logits() -> dict[str, float]:
    """‖logits - exact‖ / ‖exact‖ of each scheme on random weights, in float32 but for the row that says otherwise."""
    path, (length, count) = checkpoint(RANDOM), ROWS
    draw = torch.Generator().manual_seed(0)
    model = load_model(path, dtype="float32")
    texts = torch.randint(FIRST_WORD, model.config.vocab_size, (count, length), generator=draw).tolist()
    exact = model.logits(torch.cat(read_texts(model, texts)))
    found: dict[str, float] = {}
    for name, given, kv_dtype in (
        ("bfloat16", {"dtype": "bfloat16"}, None),
        ("int8", {"quantization": "int8"}, None),
        ("int8, KV int8", {"quantization": "int8"}, torch.int8),
        ("w8a8", {"quantization": "w8a8"}, None),
        ("w8a8, KV int8", {"quantization": "w8a8"}, torch.int8),
    ):
        model = load_model(path, **{"dtype": "float32", **given})  # type: ignore[arg-type]
        other = model.logits(torch.cat(read_texts(model, texts, kv_dtype)))
        found[name] = float((other - exact).norm() / exact.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1600, help="prompts per kind and language")
    count = parser.parse_args().count
    report: dict[str, Any] = {"quality": {}, "missed": []}
    for name, figures, bars in quality():
        print(name, json.dumps(figures), flush=True)
        report["quality"][name] = figures
        report["missed"] += [f"{name}: {bar.name} {bar.figure:.4f}" for bar in bars if not bar.met]
    report["logits"] = logits()
    print("relative error of logits", json.dumps(report["logits"]), flush=True)
    report["vllm"] = vllm_check.run()
    report["missed"] += [f"vLLM, {scheme}" for scheme, found in report["vllm"].items() if not found["ok"]]
    print("vLLM", json.dumps(report["vllm"]), flush=True)
    plain = by_kind(accuracy("", count))
    report["accuracy"] = {"bfloat16": plain, "float32": by_kind(accuracy("dtype=float32", count))}  # for a measure
    for settings, _, _ in POLICIES:
        found = by_kind(accuracy(settings, count))
        report["accuracy"][settings] = found
        print("accuracy", settings, json.dumps(found), flush=True)
        report["missed"] += [
            f"{settings}: {kind} {found[kind]:.4f} for {plain[kind]:.4f}"
            for kind in plain
            if abs(found[kind] - plain[kind]) > ACCURACY
        ]
    print("\n".join(report["missed"]) or "every bar is met")
    print(json.dumps({**report, "count": count}))


if __name__ == "__main__":
    main()
