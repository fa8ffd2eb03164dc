"""What streaming costs the API worker: processor time per server-sent event, beside a bare sse-starlette application.

    python -m tandem.benchmarks.bench.frontend --save benchmarks/results/frontend

The model is `null`, so all that is measured is messages, detokenizing, wording, HTTP. Three parts:

events     N streams, one token per event: the null model's steps take `--pace` milliseconds, asleep, so the worker is
           never late and has nothing to merge. In the same run, round by round, a bare application (`bare.py`) sends
           the very bytes of one of those streams at the same pace to as many readers, once by sse-starlette and once by
           starlette's StreamingResponse. Processor time is taken while all streams run, so that neither requests nor
           their ends are in it.
tokens     the same streams with a step that takes no time: the worker falls behind, and tokens that wait for a stream
           leave as one event. Tokens per second through HTTP, client and engine on the same machine.
requests   what a short answer costs, all of it: parsing, template, tokenizer, and eight tokens.

Processor time is exact (/proc/PID/task/*/schedstat), of whole processes, system calls and kernel included.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import markdown, result
from .raw import Broken, Streams, events_of, read_streams
from .served import Served, bare, tandem
from .stats import Spread, interleaved, ratio, spread

CHAT = "/v1/chat/completions"
SHORT = 8  # tokens of a short answer
WORKER = "tandem-api"


def chat_body(model: str, tokens: int) -> dict[str, Any]:
    content = "Count from one to a thousand, please."
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}


def micro(seconds: Spread) -> dict[str, float | int]:
    """In microseconds."""
    return {
        "median": round(seconds.median * 1e6, 2),
        "low": round(seconds.low * 1e6, 2),
        "high": round(seconds.high * 1e6, 2),
        "samples": seconds.samples,
    }


def plain(value: Spread) -> dict[str, float | int]:
    return {"median": round(value.median, 3), "low": round(value.low, 3), "high": round(value.high, 3)}


class Measured:
    """Reads streams from a server, and says what they cost each of its processes."""

    def __init__(self, server: Served, path: str, body: dict[str, Any], tokens: int) -> None:
        self._server, self._path, self._body, self._tokens = server, path, body, tokens

    def window(self, streams: int) -> dict[str, float]:
        """Processor seconds per event while all streams run, by process; `client` is this one."""
        used: list[dict[str, float]] = []

        def take() -> None:
            used.append({**self._server.cpu(), "client": time.process_time()})

        found = self._read(streams, margin=max(8, self._tokens // 20), on_window=take)
        window = found.window
        if window is None or window.events < found.events / 2:
            raise Broken(f"{streams} streams hardly ran at the same time: is the machine busy with something else?")
        costs = {name: (used[1][name] - used[0][name]) / window.events for name in used[0]}
        return {**costs, "events_per_second": window.events / window.seconds, "events": found.events}

    def whole(self, streams: int) -> dict[str, float]:
        """Processor seconds per token from the first request to the last answer's end, by process."""
        before = {**self._server.cpu(), "client": time.process_time()}
        found = self._read(streams)
        after = {**self._server.cpu(), "client": time.process_time()}
        tokens = streams * self._tokens
        return {
            **{name: (after[name] - before[name]) / tokens for name in before},
            "tokens_per_second": tokens / found.seconds,
            "tokens_per_event": tokens / found.events,
            "seconds": found.seconds,
        }

    def _read(self, streams: int, margin: int = 0, on_window: Callable[[], None] = lambda: None) -> Streams:
        bodies = [self._body] * streams
        return read_streams(
            *(self._server.url, self._path, bodies), margin=margin, expected=self._tokens, on_window=on_window
        )


def process_of(costs: dict[str, float]) -> str:
    """The one whose processor time is a server's own: Tandem's workers, or the bare application."""
    if WORKER in costs:
        return WORKER
    (name,) = [name for name in costs if name not in ("client", "events", "events_per_second")]
    return name


def measure_events(server: Served, other: Served, options: argparse.Namespace, streams: int) -> dict[str, Any]:
    tokens, pace = options.tokens, options.pace / 1000
    body = chat_body("paced", tokens)
    sides = {
        "tandem": Measured(server, CHAT, body, tokens),
        "sse-starlette": Measured(other, f"/sse?pace={pace}", {}, tokens),
        "StreamingResponse": Measured(other, f"/plain?pace={pace}", {}, tokens),
    }
    calls = {name: (lambda _, side=side: side.window(streams)) for name, side in sides.items()}
    found = interleaved(calls, options.rounds, on_done=lambda name, number: say(f"{streams} streams, {name}, {number}"))
    own = {name: [costs[process_of(costs)] for costs in rounds] for name, rounds in found.items()}
    tandem_rounds = found["tandem"]
    names = [name for name in tandem_rounds[0] if not name.startswith("events")]
    return {
        "streams": streams,
        "cpu_us_per_event": {name: micro(spread(values)) for name, values in own.items()},
        "ratio_to_sse_starlette": plain(ratio(own["tandem"], own["sse-starlette"])),
        "ratio_to_StreamingResponse": plain(ratio(own["tandem"], own["StreamingResponse"])),
        "tandem_us_per_event_by_process": {
            name: micro(spread([costs[name] for costs in tandem_rounds])) for name in names
        },
        "events_per_second": {
            name: plain(spread([costs["events_per_second"] for costs in rounds])) for name, rounds in found.items()
        },
        "tokens_per_event": round(streams * tokens / tandem_rounds[-1]["events"], 3),
    }


def measure_whole(server: Served, body: dict[str, Any], tokens: int, streams: int, rounds: int) -> dict[str, Any]:
    side = Measured(server, CHAT, body, tokens)
    side.whole(streams)
    found = [side.whole(streams) for _ in range(rounds)]
    rates = ("tokens_per_second", "tokens_per_event", "seconds")
    return {
        "streams": streams,
        "tokens": tokens,
        "cpu_us_per_token": {
            name: micro(spread([one[name] for one in found])) for name in found[0] if name not in rates
        },
        **{name: plain(spread([one[name] for one in found])) for name in rates},
    }


def record(server: Served, other: Served, tokens: int) -> int:
    """Gives the bare application the events of one of Tandem's streams; how many bytes they have."""
    chunks = events_of(server.url, CHAT, chat_body("paced", tokens))
    events = [event + "\n\n" for event in b"".join(chunks).decode().split("\n\n") if event]
    request = urllib.request.Request(
        f"{other.url}/record", json.dumps(events).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["events"] == len(events)
    return sum(map(len, events))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    most = max(options.streams)
    models = [f"paced=null:{options.pace:g}", "free=null"]
    flags = ["--max-num-seqs", most, "--max-num-batched-tokens", 8192, "--api-workers", options.api_workers]
    with tandem(*models, *flags) as server, bare() as other:
        size = record(server, other, options.tokens)
        found: dict[str, Any] = {
            "api_workers": options.api_workers,
            "pace_ms": options.pace,
            "bytes_per_event": round(size / options.tokens, 1),
            "events": [measure_events(server, other, options, streams) for streams in options.streams],
        }
        found["tokens"] = [
            measure_whole(server, chat_body("free", options.free_tokens), options.free_tokens, streams, options.rounds)
            for streams in options.streams
        ]
        found["requests"] = measure_whole(server, chat_body("free", SHORT), SHORT, 64, options.rounds)
    return found


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown, medians with the middle 80 % of the rounds."""

    def shown(value: dict[str, float]) -> str:
        return f"{value['median']:g} ({value['low']:g}–{value['high']:g})"

    lines = ["| streams | side | CPU µs per event | Tandem ÷ this side | events/s |", "|---|---|---|---|---|"]
    for one in found["events"]:
        for name, cost in one["cpu_us_per_event"].items():
            quotient = one.get("ratio_to_" + name.replace("-", "_"))
            rate = f"{one['events_per_second'][name]['median']:,.0f}"
            lines.append(
                f"| {one['streams']} | {name} | {shown(cost)} | {shown(quotient) if quotient else ''} | {rate} |"
            )
    processes = [name for name in found["tokens"][0]["cpu_us_per_token"]]
    lines += ["", "| streams | tokens/s | tokens per event | " + " | ".join(f"{name}, CPU µs" for name in processes)]
    lines[-1] += " |"
    lines.append("|---|---|---|" + "---|" * len(processes))
    for one in found["tokens"]:
        costs = " | ".join(shown(one["cpu_us_per_token"][name]) for name in processes)
        rate = one["tokens_per_second"]["median"]
        lines.append(f"| {one['streams']} | {rate:,.0f} | {one['tokens_per_event']['median']:.1f} | {costs} |")
    short = found["requests"]
    per_request = short["cpu_us_per_token"][WORKER]["median"] * SHORT
    lines += ["", f"A streamed answer of {SHORT} tokens, from its request on: {per_request:,.0f} µs of the API worker."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--pace", type=float, default=20.0, help="milliseconds of a step where tokens do not coalesce")
    parser.add_argument("--tokens", type=int, default=250, help="of an answer at that pace")
    parser.add_argument("--free-tokens", type=int, default=1000, help="of an answer where steps take no time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--label", default="", help="kept with the result")
    parser.add_argument("--save", type=Path, help="writes this path with .json and .md behind it")
    options = parser.parse_args()
    found = {"benchmark": "frontend", "label": options.label, **result.describe(), **measure(options)}
    print(table(found))
    if options.save:
        result.save(options.save.with_suffix(".json"), found)
        markdown.write(options.save, found, "What streaming costs the API worker", table(found))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
