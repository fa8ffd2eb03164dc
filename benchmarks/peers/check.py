"""Whether every engine here computes the same model.

    python -m tandem.benchmarks.peers.check [--engine tandem,vllm] [--model random:125m] [--threads 2]

Each engine that is set up loads the checkpoint and answers 16 prompts greedily, the first alone and all together. Its
tokens are laid beside those of transformers in float32: how many, on average, come before the first other one.
Random weights have near-ties, so rounding alone parts engines after some tokens; a wrong rotation, mask or cache
parts them at the first. The speeds are of one short run each, one engine after another: `tandem bench` measures.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from ..bench.engines import ENGINES, EngineError, interpreter, start
from ..bench.protocol import ChildError
from .checkpoint import FIRST_WORD, SHAPES, checkpoint

PROMPT, TOKENS, BATCH = 64, 32, 16
DTYPES = {
    "tandem": ("float32", "bfloat16"),
    "transformers": ("float32", "bfloat16"),
    "vllm": ("float32", "bfloat16"),
    "llama.cpp": ("bfloat16", "float16", "int8"),
    "ctranslate2": ("float32", "bfloat16", "int8"),
}


def run(name: str, dtype: str, model: str, prompts: list[list[int]], threads: int | None) -> dict[str, Any]:
    with start(name, threads=threads) as child:
        loaded = child.load(checkpoint(model), {"dtype": dtype, "threads": threads, "max_num_seqs": BATCH})
        child.generate(prompts[:1], [4])  # warm-up
        alone = child.generate(prompts[:1], [TOKENS])
        together = child.generate(prompts, [TOKENS] * len(prompts))
    return {"loaded": loaded, "alone": alone, "together": together}


def agreed(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Tokens before the first difference, on average."""
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    ]
    return sum(same) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=",".join(ENGINES))
    parser.add_argument("--model", default="random:125m")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    draw = random.Random(0)
    words = range(FIRST_WORD, SHAPES[options.model.partition(":")[2]].vocab_size)
    prompts = [draw.choices(words, k=PROMPT) for _ in range(BATCH)]
    reference = run("transformers", "float32", options.model, prompts, options.threads)["together"]["token_ids"]
    print(
        f"{'engine':13}{'asked for':>10}{'computes in':>14}{'import s':>9}{'load s':>7}{'1: tok/s':>9}"
        f"{BATCH:>4}: tok/s  agree  alone"
    )
    for name in options.engine.split(","):
        try:
            interpreter(name)
        except EngineError as error:
            print(f"{name:13}{error}")
            continue
        for dtype in DTYPES[name]:
            try:
                found = run(name, dtype, options.model, prompts, options.threads)
            except ChildError as error:
                print(f"{name:13}{dtype:>10}  {error}")
                continue
            loaded, alone, together = found["loaded"], found["alone"], found["together"]
            speeds = [sum(answer["output_tokens"]) / answer["seconds"] for answer in (alone, together)]
            same = agreed(together["token_ids"], reference), agreed(alone["token_ids"], reference[:1])
            print(
                f"{name:13}{dtype:>10}{loaded['dtype']:>14}{loaded['import_seconds']:9.1f}{loaded['load_seconds']:7.1f}"
                f"{speeds[0]:9.1f}{speeds[1]:11.1f}{same[0]:7.1f}{same[1]:7.0f}   of {TOKENS}; {loaded['versions']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
