"""What the records of a run amount to: vLLM's figures by vLLM's definitions, and ours below them.

ttft   from sending a request to the first chunk with content
tpot   (end of the answer - ttft) / (output tokens - 1); answers of one token have none
itl    between two chunks with content, whatever number of tokens they bring; chunks that arrive in one read are 0 apart
e2el   from sending a request to the last chunk of its answer

Only complete answers count, in latencies as in throughput; the time is that of the whole run, from its start to its
last answer. A chunk has content when it brings text, reasoning, a tool call or token ids: the role that opens a chat
stream is none (vLLM's tool counts it), nor is a chunk that only ends the answer.

Output tokens are the server's `usage.completion_tokens`; where it sends none, the chunks with content are counted, and
`tokens_counted_by` says "chunks".
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from .client import Outcome, Record
from .stats import percentile

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT = ("ttft", "tpot", "e2el")
OURS = (50.0, 90.0, 99.0)  # percentiles that are always there
QUANTILES = (*range(100), 99.5, 99.9, 100)  # of the curves that reports draw
CPU_LIMIT = 0.8  # of a core: above it the client is in the way of what it measures
LAG_LIMIT = 0.005  # seconds that a timer of the client fired late, 99th percentile
DETAILS = ("input_lens", "output_lens", "start_times", "queue_times", "ttfts", "itls", "latencies")
DETAILS += ("generated_texts", "errors", "finish_reasons")

Result = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """What is printed, and what a good request is (milliseconds by metric)."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] | None = None


def output_tokens(record: Record) -> int:
    if record.error:
        return 0
    return record.completion_tokens if record.completion_tokens else len(record.times)


def tpot(record: Record) -> float | None:
    tokens = output_tokens(record)
    return (record.end - record.times[0]) / (tokens - 1) if tokens > 1 else None


def gaps(record: Record) -> list[float]:
    return [later - earlier for earlier, later in zip(record.times, record.times[1:], strict=False)]


def measure(outcome: Outcome, input_lens: Sequence[int], selection: Selection) -> Result:
    """The figures of one run under vLLM's names, per-request lists included; `tandem` holds ours.

    `input_lens`: tokens of the prompts where the server does not say, 0 for unknown.
    """
    records = outcome.records
    complete = [record for record in records if not record.error]
    duration = max(outcome.ended - outcome.began, 1e-9)
    inputs = [
        length if record.prompt_tokens is None else record.prompt_tokens
        for record, length in zip(records, input_lens, strict=True)
    ]
    given = sum(length for record, length in zip(records, inputs, strict=True) if not record.error)
    made = sum(map(output_tokens, complete))
    rate, peak_concurrency = _by_second(complete)
    values = {
        "ttft": [record.times[0] for record in complete],
        "tpot": [one for record in complete if (one := tpot(record)) is not None],
        "itl": [gap for record in complete for gap in gaps(record)],
        "e2el": [record.end for record in complete],
    }
    result: Result = {
        "duration": duration,
        "completed": len(complete),
        "failed": len(records) - len(complete),
        "total_input_tokens": given,
        "total_output_tokens": made,
        "request_throughput": len(complete) / duration,
        "request_goodput": None,
        "output_throughput": made / duration,
        "total_token_throughput": (given + made) / duration,
        "max_output_tokens_per_s": rate,
        "max_concurrent_requests": peak_concurrency,
        "input_lens": inputs,
        "output_lens": [output_tokens(record) for record in records],
        "start_times": [record.start for record in records],
        "queue_times": [record.start - record.due for record in records],
        "ttfts": [record.times[0] if record.times else 0.0 for record in records],
        "itls": [gaps(record) for record in records],
        "latencies": [record.end for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
        "finish_reasons": [record.finish_reason for record in records],
    }
    if selection.goodput is not None:
        good = sum(is_good(record, selection.goodput) for record in complete)
        result["request_goodput"] = good / duration
    for name, seconds in values.items():
        result |= _statistics(name, seconds, sorted({*OURS, *selection.percentiles}))
    result["tandem"] = _ours(outcome, complete, inputs, values)
    return result


def is_good(record: Record, goodput: Mapping[str, float]) -> bool:
    found = {"ttft": record.times[0], "tpot": tpot(record) or 0.0, "e2el": record.end}
    return all(found[name] * 1000 <= limit for name, limit in goodput.items())


def _statistics(name: str, seconds: list[float], percentiles: Iterable[float]) -> Result:
    """Milliseconds; 0 where nothing was measured, as vLLM has it."""
    ordered = [1000 * value for value in sorted(seconds)] or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(ordered),
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": statistics.pstdev(ordered),
        **{f"p{p:g}_{name}_ms": percentile(ordered, p) for p in percentiles},
    }


def _by_second(complete: list[Record]) -> tuple[float, int]:
    """The most output tokens that arrived within one second, and the most requests that one such second saw.

    Seconds begin with the first request. A chunk counts as its answer's tokens divided by its chunks.
    """
    if not complete:
        return 0.0, 0
    began = min(record.start for record in complete)
    tokens: defaultdict[int, float] = defaultdict(float)
    requests: Counter[int] = Counter()
    for record in complete:
        start = record.start - began
        each = output_tokens(record) / len(record.times)
        for moment in record.times:
            tokens[int(start + moment)] += each
        for second in range(int(start), int(start + record.end) + 1):
            requests[second] += 1
    return max(tokens.values()), max(requests.values())


def _ours(outcome: Outcome, complete: list[Record], inputs: list[int], values: dict[str, list[float]]) -> Result:
    told = [record for record in complete if record.cached_tokens is not None]
    prompt = sum(record.prompt_tokens or 0 for record in told)
    duration = max(outcome.ended - outcome.began, 1e-9)
    chunks = sum(len(record.times) for record in complete)
    counted = Counter("usage" if record.completion_tokens else "chunks" for record in complete)
    lags = outcome.lags or [0.0]
    waits = [record.start - record.due for record in outcome.records] or [0.0]
    return {
        "tokens_counted_by": " and ".join(sorted(counted)) or None,
        "input_tokens_counted_by": "usage" if complete and all(r.prompt_tokens is not None for r in complete) else "us",
        "chunks": chunks,
        "tokens_per_chunk": sum(map(output_tokens, complete)) / chunks if chunks else None,
        "cached_prompt_tokens": sum(record.cached_tokens or 0 for record in told) if told else None,
        "prefix_cache_share": sum(record.cached_tokens or 0 for record in told) / prompt if prompt else None,
        "finish_reasons": dict(Counter(record.finish_reason for record in complete).most_common()),
        "failures": dict(Counter(record.error for record in outcome.records if record.error).most_common(10)),
        "peak_open_requests": _peak_open(outcome.records),
        "send_delay_p99_ms": 1000 * percentile(waits, 99),
        "send_delay_max_ms": 1000 * max(waits),
        "client": {
            "cpu_seconds": outcome.cpu_seconds,
            "cpu_share": outcome.cpu_seconds / duration,
            "busiest_second": outcome.busiest,
            "lag_p99_ms": 1000 * percentile(lags, 99),
            "reads": outcome.reads,
            "events": outcome.events,
        },
        "quantiles": {
            name: {"percent": list(QUANTILES), "ms": [1000 * percentile(ordered, p) for p in QUANTILES]}
            for name, seconds in values.items()
            if (ordered := sorted(seconds))
        },
    }


def _peak_open(records: list[Record]) -> int:
    """Requests that were open at the same moment."""
    changes = [(record.start, 1) for record in records] + [(record.start + record.end, -1) for record in records]
    most = open_now = 0
    for _, change in sorted(changes):
        open_now += change
        most = max(most, open_now)
    return most


def doubts(result: Result, on_time: bool) -> list[str]:
    """Sentences about what makes a run's figures less than they look. `on_time`: every request had a moment of its own
    at which nothing but the client kept it from being sent."""
    ours, found = result["tandem"], []
    client = ours["client"]
    if client["busiest_second"] > CPU_LIMIT:
        found.append(
            f"the client used {client['busiest_second']:.0%} of a core in its busiest second (more than "
            f"{CPU_LIMIT:.0%}): its own delay is in these latencies, and it may be what limits throughput"
        )
    if client["lag_p99_ms"] > 1000 * LAG_LIMIT:
        found.append(
            f"timers of the client fired {client['lag_p99_ms']:.1f} ms late (99th percentile): what arrived may have "
            "waited there as long before it was seen"
        )
    if on_time and ours["send_delay_p99_ms"] > 1000 * LAG_LIMIT:
        found.append(f"requests left {ours['send_delay_p99_ms']:.1f} ms after their time (99th percentile)")
    if "chunks" in (ours["tokens_counted_by"] or ""):
        found.append("without usage from the server, output tokens are chunks with content, which may hold several")
    if result["failed"]:
        found.append(
            f"{result['failed']} of {result['failed'] + result['completed']} requests failed and count nowhere else"
        )
    return found


def block(result: Result, selection: Selection, max_concurrency: int | None, request_rate: float) -> Iterator[str]:
    """vLLM's lines of a result."""
    yield f"{' Serving Benchmark Result ':=^50}"
    yield line("Successful requests:", round(result["completed"]))
    yield line("Failed requests:", round(result["failed"]))
    if max_concurrency is not None:
        yield line("Maximum request concurrency:", max_concurrency)
    if request_rate != math.inf:
        yield line("Request rate configured (RPS):", float(request_rate))
    yield line("Benchmark duration (s):", result["duration"])
    yield line("Total input tokens:", round(result["total_input_tokens"]))
    yield line("Total generated tokens:", round(result["total_output_tokens"]))
    yield line("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        yield line("Request goodput (req/s):", result["request_goodput"])
    yield line("Output token throughput (tok/s):", result["output_throughput"])
    yield line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield line("Peak concurrent requests:", float(result["max_concurrent_requests"]))
    yield line("Total token throughput (tok/s):", result["total_token_throughput"])
    for name in METRICS:
        if name not in selection.metrics:
            continue
        short, title = METRICS[name]
        yield f"{title:-^50}"
        yield line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        yield line(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for p in selection.percentiles:
            yield line(f"P{p:g} {short} (ms):", result[f"p{p:g}_{name}_ms"])
    yield "=" * 50


def line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def our_lines(result: Result, paced: bool = True) -> Iterator[str]:
    """What vLLM's tool does not say. `paced`: requests had moments of their own, at which they were to be sent."""
    ours, client = result["tandem"], result["tandem"]["client"]
    yield "Tandem: " + "-" * 42
    for name, (short, _) in METRICS.items():
        figures = " / ".join(f"{result[f'p{p:g}_{name}_ms']:.2f}" for p in OURS)
        yield f"{short + ' p50 / p90 / p99 (ms):':<40} {figures}"
    yield f"{'Output tokens counted by:':<40} {ours['tokens_counted_by']}"
    if ours["tokens_per_chunk"] is not None:
        yield line("Output tokens per chunk:", ours["tokens_per_chunk"])
    yield line("Peak open requests:", ours["peak_open_requests"])
    if ours["prefix_cache_share"] is not None:
        yield line("Prompt tokens from a prefix cache (%):", 100.0 * ours["prefix_cache_share"])
    yield from _server_lines(ours.get("server"))
    yield line("Client CPU (% of a core):", 100.0 * client["cpu_share"])
    yield line("Client CPU, busiest second (%):", 100.0 * client["busiest_second"])
    if paced:
        yield line("P99 wait before sending (ms):", ours["send_delay_p99_ms"])
    yield line("CPU used by others (cores):", ours["others_cpu_cores"])
    for reason, count in ours["failures"].items():
        yield f"failed {count:>5}x  {reason}"


def _server_lines(server: Result | None) -> Iterator[str]:
    if server is None:
        return
    if "not_measured" in server:
        yield f"{'Server CPU:':<40} not measured: {server['not_measured']}"
        return
    yield line("Server CPU (s):", server["cpu_seconds"])
    if server["cpu_us_per_output_token"] is not None:
        yield line("Server CPU per output token (us):", server["cpu_us_per_output_token"])
    yield f"{'  by process:':<40} {'us/token':>9} {'CPU s':>9} {'peak RSS MiB':>13}"
    for process in server["processes"]:
        each = process["cpu_us_per_output_token"] or 0.0
        name = f"  {process['name']} ({process['pid']})"
        yield f"{name:<40} {each:>9.2f} {process['cpu_seconds']:>9.2f} {process['peak_rss'] / 2**20:>13.0f}"


def median_of(results: Sequence[Result]) -> Result:
    """Figure by figure; what is no number, or not one in every run, is that of the run with the median throughput."""
    ordered = sorted(results, key=lambda result: result["output_throughput"])
    return _median(list(results), ordered[(len(ordered) - 1) // 2])


def _median(results: list[Result], typical: Result) -> Result:
    found: Result = {}
    for name, value in typical.items():
        others = [result.get(name) for result in results]
        if name in ("quantiles", "processes", "failures", "finish_reasons", "doubts"):
            found[name] = value
        elif isinstance(value, dict):
            found[name] = _median([other for other in others if isinstance(other, dict)], value)
        elif len(figures := [other for other in others if is_figure(other)]) == len(results):
            found[name] = statistics.median(figures)
        else:
            found[name] = value
    return found


def is_figure(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
