"""K answers to one prompt, scored together and one by one: how many tokens are computed, and how long does it take?

`/v1/rlhf/score_group` against as many requests to `/v1/rewards` at once, with the prefix cache off so that these share
nothing, in turns on one server. The model is a reward model of 125M random parameters. Computed tokens are read from
/metrics.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx

from ..bench.served import tandem
from ..bench.stats import interleaved, ratio, spread
from ..peers.checkpoint import FIRST_WORD, SHAPES, checkpoint

MODEL = "125m-reward"
GOAL = 2.5  # times as fast
COMPUTED = r"^tandem:computed_tokens_total\{[^}]*\} (\S+)"


def computed_tokens(http: httpx.Client) -> int:
    """Tokens of prompts that the engine has computed so far."""
    text = http.get("/metrics").raise_for_status().text
    return sum(int(float(value)) for value in re.findall(COMPUTED, text, re.MULTILINE))


class Load:
    """A new prompt and new answers each time."""

    def __init__(self, http: httpx.Client, vocab_size: int, k: int, prompt: int, answer: int) -> None:
        self._http, self._vocab_size = http, vocab_size
        self._k, self._prompt, self._answer = k, prompt, answer
        self._draw = random.Random(7)
        self.computed: dict[str, list[int]] = {}
        self.differences: list[float] = []

    def _ids(self, count: int) -> list[int]:
        return [self._draw.randrange(FIRST_WORD, self._vocab_size) for _ in range(count)]

    def together(self, prompt: list[int], answers: list[list[int]]) -> list[float]:
        body = {"prompt_token_ids": prompt, "completions": [{"token_ids": ids} for ids in answers]}
        return self._http.post("/v1/rlhf/score_group", json=body).raise_for_status().json()["scores"]

    def apart(self, prompt: list[int], answers: list[list[int]]) -> list[float]:
        def score(ids: list[int]) -> float:
            answer = self._http.post("/v1/rewards", json={"input": [prompt + ids]})
            return answer.raise_for_status().json()["data"][0]["reward"]

        with ThreadPoolExecutor(len(answers)) as pool:
            return list(pool.map(score, answers))

    def measure(self, name: str) -> float:
        """Seconds."""
        given = self._ids(self._prompt), [self._ids(self._answer) for _ in range(self._k)]
        before = computed_tokens(self._http)
        began = time.perf_counter()
        scores = getattr(self, name)(*given)
        seconds = time.perf_counter() - began
        self.computed.setdefault(name, []).append(computed_tokens(self._http) - before)
        if name == "together":
            others = self.apart(*given)
            self.differences += [abs(a - b) / max(1.0, abs(b)) for a, b in zip(scores, others, strict=True)]
        return seconds


def run(k: int, prompt: int, answer: int, rounds: int, threads: int, model: str = MODEL) -> dict[str, Any]:
    options = ("--threads", threads, "--dtype", "float32", "--no-enable-prefix-caching")
    with ExitStack() as stack:
        server = stack.enter_context(tandem(f"reward={checkpoint(f'random:{model}')}", *options))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=600))
        load = Load(http, SHAPES[model].vocab_size, k, prompt, answer)
        sides = {"together": lambda _: load.measure("together"), "apart": lambda _: load.measure("apart")}
        taken = interleaved(sides, rounds)
    faster = ratio(taken["apart"], taken["together"])
    least, unshared = prompt + k * answer, k * (prompt + answer)
    found: dict[str, Any] = {
        "k": k,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "rounds": rounds,
        "computed_together": sorted(set(load.computed["together"])),
        "computed_apart": sorted(set(load.computed["apart"])),
        "seconds_together": round(spread(taken["together"]).median, 3),
        "seconds_apart": round(spread(taken["apart"]).median, 3),
        "times_faster": round(faster.median, 2),
        "largest_difference": max(load.differences),
    }
    exact = found["computed_together"] == [least] and found["computed_apart"] == [unshared]
    return {**found, "ok": exact and faster.median >= GOAL and found["largest_difference"] <= 1e-5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--answer", type=int, default=250, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    found = run(options.k, options.prompt, options.answer, options.rounds, options.threads)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
