"""Does a sequence get the same numbers however it is asked for? On the bundled models, in float32.

Log-probabilities that sampling returned against those that `/v1/rlhf/evaluate` gives for the same tokens, and those of
`/v1/rlhf/rollout`; scores of texts alone against the same texts in batches of any make-up, while chats are written.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from ..bench.served import tandem

POLICY, REWARD = "tandem-demo", "tandem-demo-reward"
PROMPTS = ("What is 12 + 30?", "Where is Paris?", "Say hello to Anna.", "What is 7 * 8?", "Tell me something.")
CLOSE = 1e-5  # of a score, times its size where that is above 1
CLOSE_LOGPROB = 1e-3


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    return http.post(path, json=body).raise_for_status().json()


def logprobs(http: httpx.Client, n: int) -> dict[str, float]:
    """The largest differences: of chat sampling to evaluate, and of rollout to evaluate."""
    worst = {"sampling": 0.0, "rollout": 0.0}
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}]
        chat = post(
            http, "/v1/chat/completions", model=POLICY, messages=messages, n=n, max_tokens=40, seed=1, temperature=1.0,
            logprobs=True, return_token_ids=True,
        )  # fmt: skip
        sampled = [
            (choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]])
            for choice in chat["choices"]
        ]
        worst["sampling"] = max(worst["sampling"], furthest(http, chat["prompt_token_ids"], sampled))
        rolled = post(
            http, "/v1/rlhf/rollout", messages=[messages], n=n, want=["policy_logprobs"],
            sampling={"max_tokens": 40, "seed": 2, "temperature": 1.0, "top_p": 0.9},
        )  # fmt: skip
        found = [(one["token_ids"], one["policy_logprobs"]) for one in rolled["sequences"]]
        worst["rollout"] = max(worst["rollout"], furthest(http, rolled["prompt_token_ids"][0], found))
    return worst


def furthest(http: httpx.Client, prompt: list[int], sampled: list[tuple[list[int], list[float]]]) -> float:
    group = {"prompt_token_ids": prompt, "completions": [{"token_ids": ids} for ids, _ in sampled]}
    judged = post(http, "/v1/rlhf/evaluate", groups=[group], want=["policy_logprobs"])["groups"][0]["completions"]
    return max(
        abs(a - b)
        for (_, given), one in zip(sampled, judged, strict=True)
        for a, b in zip(given, one["policy_logprobs"], strict=True)
    )


def texts(count: int, draw: random.Random) -> list[list[dict[str, str]]]:
    words = (
        "yes",
        "no",
        "4",
        "12",
        "Anna",
        "Paris",
        "is",
        "the",
        "a",
        "of",
        "and",
        "water",
        "hello",
        "你好",
        "sum",
        "=",
    )
    return [
        [
            {"role": "user", "content": draw.choice(PROMPTS)},
            {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randrange(1, 120)))},
        ]
        for _ in range(count)
    ]


def scores(http: httpx.Client, count: int, batches: int) -> float:
    """The largest difference of a text's score alone to that in a batch, as a part of max(1, |score|)."""
    draw = random.Random(3)
    every = texts(count, draw)

    def score(chosen: list[int]) -> list[float]:
        answer = post(http, "/v1/rewards", model=REWARD, conversations=[every[number] for number in chosen])
        return [entry["raw_reward"] for entry in answer["data"]]

    alone = [score([number])[0] for number in range(count)]
    chosen = [draw.sample(range(count), draw.randrange(2, count)) for _ in range(batches)]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            post(http, "/v1/completions", model=POLICY, prompt="Tell me", max_tokens=60, n=4)

    worst = 0.0
    with ThreadPoolExecutor(8) as pool:
        writing = pool.submit(write)
        for numbers, found in zip(chosen, pool.map(score, chosen), strict=True):
            for number, value in zip(numbers, found, strict=True):
                worst = max(worst, abs(value - alone[number]) / max(1.0, abs(alone[number])))
        stop.set()
        writing.result()
    return worst


def run(n: int, count: int, batches: int) -> dict[str, Any]:
    with tandem("--dtype", "float32") as server, httpx.Client(base_url=server.url, timeout=120) as http:
        found = logprobs(http, n)
        worst = scores(http, count, batches)
    close = max(found.values()) <= CLOSE_LOGPROB and worst <= CLOSE
    return {
        "sampling_to_evaluate": found["sampling"],
        "rollout_to_evaluate": found["rollout"],
        "scores_alone_to_batch": worst,
        "batches": batches,
        "ok": close,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8, help="answers per prompt")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--batches", type=int, default=30)
    options = parser.parse_args()
    found = run(options.n, options.texts, options.batches)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
