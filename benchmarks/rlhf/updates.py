"""New weights while chats are streamed: does every token say which weights drew it, and is nothing of the old ones hit?

Two checkpoints take turns. Their weights differ, and each can only draw from its own half of the words (the rows of the
other half are 0 in its head), so that a greedy token shows which weights drew it; `weight_spans` must say the same.
After every update a prompt that is in the prefix cache from earlier versions is asked again: the answer must be the one
that transformers computes with these weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from ..bench.served import tandem
from ..bench.stats import percentile
from ..peers.checkpoint import FIRST_WORD, Shape, write

SHAPE = Shape(vocab_size=4096, hidden=256, inner=512, layers=4, heads=4, kv_heads=2)
MIDDLE = (FIRST_WORD + SHAPE.vocab_size) // 2  # the first token of the second half of the words
PROBE = [FIRST_WORD + 7 * number % 3000 for number in range(150)]
PROBED = 12  # tokens
ANSWER = 160  # tokens of a chat
NAME = "policy"


def write_pair(directory: Path) -> tuple[Path, Path]:
    """The two checkpoints."""
    from safetensors.torch import load_file, save_file

    found: list[Path] = []
    for number, kept in enumerate((slice(FIRST_WORD, MIDDLE), slice(MIDDLE, SHAPE.vocab_size))):
        path = directory / f"weights-{number}"
        write(path, SHAPE, seed=number)
        file = path / "model.safetensors"
        tensors = load_file(file)
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head.new_zeros(head.shape)
        tensors["lm_head.weight"][kept] = head[kept]
        save_file(tensors, file, metadata={"format": "pt"})
        found.append(path)
    return found[0], found[1]


def expected(path: Path) -> list[int]:
    """transformers' greedy continuation of the probe, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([PROBE])
    for _ in range(PROBED):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(PROBE) :].tolist()


@dataclass
class Seen:
    """What the clients saw."""

    chats: int = 0
    tokens: int = 0
    crossing: int = 0  # chats that more than one version wrote
    failed: list[str] = field(default_factory=list[str])
    wrong_spans: list[str] = field(default_factory=list[str])
    stale: list[str] = field(default_factory=list[str])
    gaps: list[float] = field(default_factory=list[float])  # seconds between two chunks of a stream
    updates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


async def chat_on(client: openai.AsyncOpenAI, number: int, seen: Seen, stop: asyncio.Event) -> None:
    """One chat after another, until `stop`."""
    turn = 0
    while not stop.is_set():
        turn += 1
        try:
            await one_chat(client, f"Chat {number}, turn {turn}: tell me more.", seen)
        except Exception as error:
            seen.failed.append(f"chat {number}, turn {turn}: {type(error).__name__}: {error}")


async def one_chat(client: openai.AsyncOpenAI, text: str, seen: Seen) -> None:
    stream = await client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": text}],
        max_tokens=ANSWER,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True, "return_weight_spans": True},
    )
    ids: list[int] = []
    spans: list[dict[str, int]] = []
    last = time.perf_counter()
    async for chunk in stream:
        now = time.perf_counter()
        for choice in chunk.choices:
            extra = choice.model_extra or {}
            if extra.get("token_ids"):
                ids += extra["token_ids"]
                seen.gaps.append(now - last)
            spans = extra.get("weight_spans") or spans
        last = now
    seen.chats += 1
    seen.tokens += len(ids)
    seen.crossing += len(spans) > 1
    if problem := check_spans(ids, spans):
        seen.wrong_spans.append(problem)


def check_spans(ids: Sequence[int], spans: Sequence[dict[str, int]]) -> str | None:
    """What is wrong; None where `spans` cover the tokens, versions rise, and each token is of its version's half."""
    if len(ids) != ANSWER:
        return f"{len(ids)} tokens instead of {ANSWER}"
    reached, version = 0, -1
    for span in spans:
        if span["start"] != reached or span["end"] <= reached or span["version"] <= version:
            return f"spans {spans} do not follow one another"
        reached, version = span["end"], span["version"]
        wrong = [ids[place] for place in range(span["start"], reached) if (ids[place] >= MIDDLE) != version % 2]
        if wrong:
            return f"tokens {wrong[:3]} are not of version {version}"
    return None if reached == len(ids) else f"spans {spans} end before token {len(ids)}"


async def update_on(url: str, paths: Sequence[Path], answers: Sequence[list[int]], count: int, seen: Seen) -> None:
    """`count` updates, each followed by the probe."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for number in range(1, count + 1):
            body = {"model": NAME, "source": "disk", "path": str(paths[number % 2]), "version": f"step-{number}"}
            began = time.perf_counter()
            answer = await http.post("/v1/rlhf/weights", json=body)
            seconds = time.perf_counter() - began
            if answer.status_code != 200:
                seen.failed.append(f"update {number}: {answer.status_code} {answer.text}")
                continue
            seen.updates.append({**answer.json(), "round_trip": seconds})
            probe = {"model": NAME, "prompt": PROBE, "max_tokens": PROBED, "temperature": 0, "return_token_ids": True}
            told = await http.post("/v1/completions", json={**probe, "ignore_eos": True})
            if told.status_code != 200:
                seen.failed.append(f"probe {number}: {told.status_code} {told.text}")
            elif told.json()["choices"][0]["token_ids"] != answers[number % 2]:
                seen.stale.append(f"after update {number}: {told.json()['choices'][0]['token_ids']}")


async def drive(url: str, paths: Sequence[Path], answers: Sequence[list[int]], streams: int, count: int) -> Seen:
    seen, stop = Seen(), asyncio.Event()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        chats = [asyncio.create_task(chat_on(client, number, seen, stop)) for number in range(streams)]
        with contextlib.suppress(asyncio.CancelledError):
            await update_on(url, paths, answers, count, seen)
        stop.set()
        await asyncio.gather(*chats)
    return seen


def run(streams: int, count: int, *arguments: object) -> dict[str, Any]:
    """The figures; `ok` says whether all went well. `arguments`: further ones of `tandem serve`."""
    with tempfile.TemporaryDirectory() as directory:
        paths = write_pair(Path(directory))
        answers = [expected(path) for path in paths]
        options = ("--dtype", "float32", "--weights-root", directory, "--max-num-seqs", 2 * streams, *arguments)
        with tandem(f"{NAME}={paths[0]}", *options) as server:
            seen = asyncio.run(drive(server.url, paths, answers, streams, count))
    for problem in (*seen.failed[:5], *seen.wrong_spans[:5], *seen.stale[:5]):
        print(problem, flush=True)
    commits = [update["commit_seconds"] for update in seen.updates] or [0.0]
    trips = [update["round_trip"] for update in seen.updates] or [0.0]
    return {
        "updates": len(seen.updates),
        "streams": streams,
        "chats": seen.chats,
        "tokens": seen.tokens,
        "chats_of_several_versions": seen.crossing,
        "failed": len(seen.failed),
        "wrong_spans": len(seen.wrong_spans),
        "stale_answers": len(seen.stale),
        "megabytes": round(max((update["bytes"] for update in seen.updates), default=0) / 1e6, 1),
        "update_ms": {name: round(1e3 * percentile(trips, p), 1) for name, p in (("p50", 50), ("max", 100))},
        "commit_ms": {name: round(1e3 * percentile(commits, p), 2) for name, p in (("p50", 50), ("max", 100))},
        "gap_ms": {name: round(1e3 * percentile(seen.gaps, p), 1) for name, p in (("p50", 50), ("p99", 99))},
        "ok": len(seen.updates) == count and not (seen.failed or seen.wrong_spans or seen.stale),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--streams", type=int, default=32)
    options = parser.parse_args()
    found = run(options.streams, options.updates)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
