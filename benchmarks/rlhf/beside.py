"""How much later do a chat's tokens come while rewards are given? Streams alone and beside scoring, in turns.

Policy and reward model have 125M random parameters each; the hub gives the prompts of the one steps that take about as
long as the decodes of the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx

from ..bench.served import tandem
from ..bench.stats import interleaved, percentile, ratio
from ..peers.checkpoint import FIRST_WORD, SHAPES, checkpoint

MOST = 2.0  # times the gap between tokens, 99th percentile


def some_ids(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(FIRST_WORD, SHAPES["125m"].vocab_size) for _ in range(count)]


async def stream(http: httpx.AsyncClient, tokens: int, draw: random.Random, gaps: list[float]) -> None:
    body = {"model": "policy", "prompt": some_ids(32, draw), "max_tokens": tokens, "stream": True, "ignore_eos": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        last: float | None = None
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now


async def score(http: httpx.AsyncClient, length: int, draw: random.Random, given: list[int]) -> None:
    """One text after another, until it is cancelled."""
    while True:
        answer = await http.post("/v1/rewards", json={"model": "reward", "input": [some_ids(length, draw)]})
        given.append(len(answer.raise_for_status().json()["data"]))


async def measure(url: str, streams: int, tokens: int, scorers: int, length: int, seed: int) -> tuple[float, int]:
    """The 99th percentile of the gaps in seconds, and how many scores were given meanwhile."""
    draw, gaps, given = random.Random(seed), list[float](), list[int]()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        scoring = [asyncio.create_task(score(http, length, draw, given)) for _ in range(scorers)]
        await asyncio.gather(*(stream(http, tokens, draw, gaps) for _ in range(streams)))
        for task in scoring:
            task.cancel()
        await asyncio.gather(*scoring, return_exceptions=True)
    return percentile(gaps, 99), sum(given)


def run(streams: int, tokens: int, scorers: int, length: int, rounds: int, threads: int) -> dict[str, Any]:
    models = (f"policy={checkpoint('random:125m')}", f"reward={checkpoint('random:125m-reward')}")
    with tandem(*models, "--threads", threads) as server:

        def side(count: int, number: int) -> tuple[float, int]:
            return asyncio.run(measure(server.url, streams, tokens, count, length, seed=2 * number + bool(count)))

        found = interleaved({"alone": lambda n: side(0, n), "beside": lambda n: side(scorers, n)}, rounds)
    gaps = {name: [gap for gap, _ in taken] for name, taken in found.items()}
    later = ratio(gaps["beside"], gaps["alone"]).median
    return {
        "streams": streams,
        "scorers": scorers,
        "scored_tokens": length,
        "rounds": rounds,
        "gap_p99_ms_alone": round(1e3 * percentile(gaps["alone"], 50), 1),
        "gap_p99_ms_beside": round(1e3 * percentile(gaps["beside"], 50), 1),
        "times_later": round(later, 2),
        "scores": sum(count for _, count in found["beside"]),
        "ok": later <= MOST and all(count > 0 for _, count in found["beside"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--scorers", type=int, default=4)
    parser.add_argument("--length", type=int, default=500, help="tokens of a text that is scored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    found = run(**vars(options))
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
