"""The held-out conversations that Tandem brings along: `python held_out.py` writes `model/demo/held_out.jsonl`.

`tandem quantize` measures quality on them. A line is a conversation and answers to it, the well-formed one first; where
the reward model was taught to rank, other answers follow it, best first. Without ReAct: its prompt is LangChain's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import data

FILE = Path(__file__).resolve().parents[2] / "model" / "demo" / "held_out.jsonl"
KINDS = tuple(kind for kind in data.KINDS if kind != "react")
RANKED = ("arithmetic", "facts", "json")


def lines(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` conversations of each kind and language, the kinds in turns."""
    cells = list(itertools.product(KINDS, ("en", "zh")))
    drawn = [data.exercises(seed, "held_out", *cell, count) for cell in cells]
    rng = random.Random(f"{seed} held out")
    return [line(rng, exercise) for exercises in zip(*drawn, strict=True) for exercise in exercises]


def line(rng: random.Random, exercise: data.Exercise) -> dict[str, Any]:
    answers = [exercise.answer]
    if exercise.kind in RANKED:
        ranked = data.rank(rng, exercise, "held_out").answers
        answers += [one.text for one in ranked if one.ended and one.text not in answers]
    tools = {"tools": exercise.tools} if exercise.tools else {}
    return {"messages": exercise.messages, **tools, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out conversations that come with Tandem.")
    parser.add_argument("--count", type=int, default=30, help="per kind and language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines(options.count, options.seed))
    options.out.write_text(text, encoding="utf-8")
    print(json.dumps({"lines": text.count("\n"), "bytes": len(text.encode())}))


if __name__ == "__main__":
    main()
