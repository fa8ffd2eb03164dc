"""The `openai` SDK and a clock: what a user sees, measured without anything of `bench serve` but its prompts.

    python -m tandem.benchmarks.bench.stopwatch --base-url URL --model NAME --tokenizer DIR --result-dir DIR …

For servers that no other tool can ask: `transformers serve` refuses a request with a field that it does not know, and
`vllm bench serve` always sends some. Takes those flags of that tool that agreement.py gives, and writes its JSON keys.
Each of `--max-concurrency` threads asks for one streamed completion after another, as text.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from openai import OpenAI
from tokenizers import Tokenizer

from .datasets import as_text, ids_to_draw_from


@dataclass(frozen=True)
class Answer:
    """Moments [s]: when it was asked for, when each piece of text came, and when it was over."""

    asked: float
    pieces: list[float]
    over: float
    tokens: int


def prompts(tokenizer: Path, count: int, length: int, seed: int) -> list[str]:
    """Texts of `length` random tokens each."""
    words, draw = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), random.Random(seed)
    known = ids_to_draw_from(words, None)
    return [as_text(words, draw.choices(known, k=length), known, draw)[1] for _ in range(count)]


def answer(client: OpenAI, model: str, prompt: str, tokens: int, temperature: float) -> Answer:
    asked, pieces, found = time.perf_counter(), list[float](), 0
    for chunk in client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=temperature,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices and chunk.choices[0].text:
            pieces.append(time.perf_counter())
        if chunk.usage is not None:
            found = chunk.usage.completion_tokens
    return Answer(asked, pieces, time.perf_counter(), found)


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """The last piece ends an answer: what comes behind it has no text."""
    duration = max(one.over for one in answers) - min(one.asked for one in answers)
    whole = [one.pieces[-1] - one.asked for one in answers]
    rates = [(one.pieces[-1] - one.pieces[0]) / (one.tokens - 1) for one in answers if one.tokens > 1]
    return {
        "median_ttft_ms": 1e3 * median(one.pieces[0] - one.asked for one in answers),
        "median_tpot_ms": 1e3 * median(rates),
        "median_itl_ms": 1e3 * median(b - a for one in answers for a, b in pairwise(one.pieces)),
        "median_e2el_ms": 1e3 * median(whole),
        "output_throughput": sum(one.tokens for one in answers) / duration,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base-url", "model", "tokenizer", "result-dir", "result-filename"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num-prompts", "random-input-len", "random-output-len", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--max-concurrency", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    given, _ = parser.parse_known_args()

    first, *texts = prompts(Path(given.tokenizer), 1 + given.num_prompts, given.random_input_len, given.seed)
    client = OpenAI(base_url=f"{given.base_url}/v1", api_key="none", max_retries=0, timeout=600)
    answer(client, given.model, first, 2, given.temperature)  # connects, and warms up
    with client, ThreadPoolExecutor(given.max_concurrency) as pool:
        answers = list(
            pool.map(lambda text: answer(client, given.model, text, given.random_output_len, given.temperature), texts)
        )
    Path(given.result_dir, given.result_filename).write_text(json.dumps(summary(answers)))


if __name__ == "__main__":
    main()
