"""Many short requests, and what every process of the server holds in memory before, meanwhile and after.

    python -m tandem.benchmarks.bench.soak --requests 100000 --save benchmarks/results/soak

The model is `null`. Requests of four kinds take turns (chat and completion, streamed and whole, one with two choices,
a stop string and log-probabilities), over `--concurrency` kept connections; every hundredth client leaves in the middle
of a long stream. Prompts differ, so the prefix cache fills and evicts.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import markdown, result
from .raw import LAST, RECEIVE, Broken, connect, request_bytes
from .served import Served, resident_bytes, tandem

LEAVES = 100  # every so many requests a client goes in the middle


def body(number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a request."""
    words = f"Number {number}: say something about it."
    common: dict[str, Any] = {"model": "null", "ignore_eos": True, "seed": number}
    chat = {**common, "messages": [{"role": "user", "content": words}], "max_tokens": 4 + number % 8}
    completion = {**common, "prompt": words, "max_tokens": 4 + number % 8}
    if number % LEAVES == 0:
        return "/v1/chat/completions", {**chat, "max_tokens": 7000, "stream": True}
    kind = number % 4
    if kind == 0:
        return "/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}
    if kind == 1:
        return "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 1}
    if kind == 2:
        return "/v1/completions", {**completion, "stream": True}
    return "/v1/completions", {**completion, "n": 2, "stop": ["qu"]}


@dataclass(slots=True)
class Connection:
    """One kept connection and the answer that comes over it."""

    socket: socket.socket
    leaves: bool = False
    streamed: bool = False
    received: bytes = b""
    length: int = -1  # of a whole answer, head included; -1: the head has not come

    def ask(self, url: str, number: int) -> None:
        path, asked = body(number)
        self.leaves, self.streamed = number % LEAVES == 0, bool(asked.get("stream"))
        self.received, self.length = b"", -1
        self.socket.sendall(request_bytes(url, path, asked))

    def take(self) -> bool:
        """Reads; whether the answer is complete, or enough of it for who leaves. Raises Broken."""
        data = self.socket.recv(RECEIVE)
        self.received += data
        if not data or not self.received.startswith(b"HTTP/1.1 200"[: len(self.received)]):
            raise Broken(self.received[:500].decode("utf-8", "replace") or "closed")
        if self.leaves:
            return self.received.count(b"data: ") > 2
        if self.streamed:
            return self.received.endswith(LAST)
        if self.length < 0 and (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            start = head.index(b"content-length: ") + 16
            self.length = end + 4 + int(head[start:].split(b"\r\n", 1)[0])
        return 0 <= self.length <= len(self.received)


def run(url: str, first: int, count: int, concurrency: int) -> float:
    """Answers requests `first` … `first + count - 1`; seconds."""
    began, last = time.perf_counter(), first + count
    number = first
    with select.epoll() as poll:
        open_: dict[int, Connection] = {}

        def start(connection: Connection) -> None:
            nonlocal number
            open_[connection.socket.fileno()] = connection
            connection.ask(url, number)
            number += 1
            poll.register(connection.socket.fileno(), select.EPOLLIN)

        while number < last and len(open_) < concurrency:
            start(Connection(connect(url)))
        while open_:
            for descriptor, _ in poll.poll(60):
                connection = open_[descriptor]
                if not connection.take():
                    continue
                poll.unregister(descriptor)
                del open_[descriptor]
                if connection.leaves or number >= last:
                    connection.socket.close()
                    if number < last:
                        start(Connection(connect(url)))
                else:
                    start(connection)
    return time.perf_counter() - began


def held(server: Served) -> dict[str, float]:
    """MiB by process; workers beyond the first are numbered."""
    found: dict[str, float] = {}
    for pid, name in server.processes().items():
        known = sum(one.split(" ")[0] == name for one in found)
        found[f"{name} {known + 1}" if known else name] = round(resident_bytes(pid) / 2**20, 2)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    flags = ["--max-num-seqs", options.concurrency, "--api-workers", options.api_workers]
    flags += ["--kv-cache-memory-bytes", "64M", "--log-level", "warning"]  # 4,096 pages: full soon
    rows: list[dict[str, Any]] = []
    with tandem("null", *flags) as server:
        rows.append({"requests": 0, "MiB": held(server)})
        done = 0
        while done < options.requests:
            count = min(options.every, options.requests - done)
            seconds = run(server.url, done, count, options.concurrency)
            done += count
            time.sleep(0.5)  # aborts are through
            rows.append({"requests": done, "per_second": round(count / seconds), "MiB": held(server)})
            print(f"  {done:9,} requests, {rows[-1]['per_second']:,}/s, MiB {rows[-1]['MiB']}", flush=True)
    settled, last = rows[min(options.settle // options.every, len(rows) - 1)], rows[-1]
    growth = {name: round(last["MiB"][name] - settled["MiB"][name], 2) for name in last["MiB"]}
    return {
        "concurrency": options.concurrency,
        "api_workers": options.api_workers,
        "rows": rows,
        "settled_at": settled["requests"],
        "growth_MiB": growth,
    }


def table(found: dict[str, Any]) -> str:
    names = list(found["rows"][0]["MiB"])
    lines = ["| requests | per second | " + " | ".join(f"{name}, MiB" for name in names) + " |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for row in found["rows"]:
        held_by = " | ".join(f"{row['MiB'][name]:.1f}" for name in names)
        lines.append(f"| {row['requests']:,} | {row.get('per_second', '')} | {held_by} |")
    growth = ", ".join(f"{name} {value:+.1f}" for name, value in found["growth_MiB"].items())
    return "\n".join([*lines, "", f"Growth from request {found['settled_at']:,} to the last, MiB: {growth}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10_000, help="requests between two looks at the memory")
    parser.add_argument("--settle", type=int, default=10_000, help="requests until caches are full")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--save", type=Path, help="writes this path with .json and .md behind it")
    options = parser.parse_args()
    found = {"benchmark": "soak", **result.describe(), **measure(options)}
    print(table(found))
    if options.save:
        result.save(options.save.with_suffix(".json"), found)
        markdown.write(options.save, found, "Memory over many requests", table(found))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
