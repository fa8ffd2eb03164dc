"""Results of any `tandem bench` command as one HTML page that needs nothing else, and its figures as PNG files.

`python -m tandem.benchmarks.bench.report RESULT.json … --out FILE.html`

Figures: how many answers came within which time (serve, latency); output tokens per second against requests that were
open at once (serve, several files); how near to its limit the machine came (throughput, latency, score, kernels).
Tables: medians and ratios with their spread, and what was measured on what. Files of `vllm bench serve` are read too.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .metrics import METRICS, QUANTILES
from .stats import percentile

WIDTH, HEIGHT = 9.0, 3.4  # inches of a figure
DOTS = 120  # per inch
NEAR_END = 99.0  # percent: up to here the axes of latencies reach
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #d8dee4}
td:first-child,th:first-child{text-align:left}code{overflow-wrap:anywhere}
.warning{color:#8a4600}.warning p{margin:.2rem 0}
"""
SHOWN = (  # of a server: key, heading
    ("completed", "requests"),
    ("failed", "failed"),
    ("output_throughput", "output tok/s"),
    ("request_throughput", "req/s"),
    ("median_ttft_ms", "TTFT p50 ms"),
    ("p99_ttft_ms", "TTFT p99 ms"),
    ("median_tpot_ms", "TPOT p50 ms"),
    ("median_itl_ms", "ITL p50 ms"),
    ("p99_itl_ms", "ITL p99 ms"),
)


class ReportError(ValueError):
    """A file cannot be shown. The message says which and why."""


@dataclass
class Found:
    """What the files hold that can be drawn or tabled."""

    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """Metric -> name -> (milliseconds, share of what was measured that took at most that long)."""
    points: defaultdict[str, list[tuple[float, float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Name -> (requests open at once, output tokens per second: median, low, high)."""
    shares: list[tuple[str, float]] = field(default_factory=list)
    """(what, share of the limit)."""
    servers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ratios: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)
    """(of what over what, figure, spread)."""
    doubts: list[str] = field(default_factory=list)


def report(results: list[Path], out: Path) -> Path:
    """Writes `out` and a PNG file per figure beside it. Returns `out`. Raises ReportError."""
    entries = [(path.stem, entry) for path in results for entry in read(path)]
    if not entries:
        raise ReportError("a report needs at least one result")
    found = Found()
    for stem, entry in entries:
        collect(found, entry, f"{stem}: " if len(entries) > 1 else "")
    out.parent.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[str, bytes]] = []
    for name, title, figure in drawings(found):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DOTS)
        out.with_name(f"{out.stem}-{name}.png").write_bytes(image.getvalue())
        figures.append((title, image.getvalue()))
    out.write_text("".join(page(found, figures, [entry for _, entry in entries])), "utf-8")
    return out


def read(path: Path) -> list[dict[str, Any]]:
    """One result, or one per line."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    try:
        found = [json.loads(text)]
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ReportError(f"{path} is not JSON: {error}") from None
    if not all(isinstance(entry, dict) for entry in found):
        raise ReportError(f"{path}: a result is a JSON object")
    return found


def collect(found: Found, entry: dict[str, Any], prefix: str) -> None:
    if "request_throughput" in entry or (entry.get("benchmark") == "serve" and "sides" in entry):
        for name, side in entry.get("sides", {entry.get("label") or entry.get("backend") or "server": entry}).items():
            collect_server(found, entry, name, side, prefix)
    if isinstance(entry.get("latencies"), list) and entry.get("benchmark") == "latency" and entry["latencies"]:
        add_curve(found, "e2el", f"{prefix}batch of {entry['batch_size']}", curve_of(entry["latencies"]))
    for name, engine in (entry.get("engines") or entry.get("sides") or {}).items():
        if "fraction_of_limit" in engine:
            found.shares.append((f"{prefix}{entry['benchmark']}, {name}", engine["fraction_of_limit"]["median"]))
    for operation in entry.get("operations", ()):
        if operation.get("share") is not None:
            found.shares.append((f"{prefix}{operation['operation']}", operation["share"]))
    for pair, about in (entry.get("ratios") or {}).items():
        figures = {"speed": about} if "median" in about else about
        found.ratios += [(f"{prefix}{pair}", name, spread) for name, spread in figures.items()]


def collect_server(found: Found, entry: dict[str, Any], name: str, side: dict[str, Any], prefix: str) -> None:
    ours = side.get("tandem") or {}
    found.servers.append((f"{prefix}{name}", side))
    quantiles = ours.get("quantiles")
    if quantiles is not None:
        for metric, values in quantiles.items():
            shares = [p / 100 for p in values["percent"]]
            add_curve(found, metric, f"{prefix}{name}", list(zip(values["ms"], shares, strict=True)))
    elif side.get("ttfts"):  # of vLLM's tool, with --save-detailed
        add_curve(found, "ttft", f"{prefix}{name}", curve_of(side["ttfts"]))
        add_curve(found, "itl", f"{prefix}{name}", curve_of([gap for gaps in side.get("itls", ()) for gap in gaps]))
    open_at_once = entry.get("max_concurrency") or ours.get("peak_open_requests") or side.get("max_concurrent_requests")
    if open_at_once and side.get("completed"):
        rate = side["output_throughput"]
        spread = side.get("spreads", {}).get("output_throughput", {"low": rate, "high": rate})
        found.points[name].append((float(open_at_once), rate, spread["low"], spread["high"]))
    for number, run in enumerate(side.get("runs", [side]), 1):
        found.doubts += [
            f"{prefix}{name}, run {number}: {doubt}" for doubt in (run.get("tandem") or {}).get("doubts", ())
        ]


def add_curve(found: Found, metric: str, name: str, curve: list[tuple[float, float]]) -> None:
    if curve:
        found.curves.setdefault(metric, {})[name] = curve


def curve_of(seconds: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(seconds)
    return [(1000 * percentile(ordered, p), p / 100) for p in QUANTILES] if ordered else []


def drawings(found: Found) -> Iterator[tuple[str, str, Figure]]:
    """(name of the file, title, figure) of everything there is something to draw for."""
    if found.curves:
        yield "latency", "Latencies: share of what took at most so long", draw_curves(found.curves)
    if found.points:
        yield "concurrency", "Throughput against concurrency", draw_points(found.points)
    if found.shares:
        yield "limit", "Share of this machine's limit (bytes and operations by formula)", draw_shares(found.shares)


def draw_curves(curves: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    names = [name for name in METRICS if name in curves]
    figure = Figure(figsize=(WIDTH, HEIGHT * ((len(names) + 1) // 2)), layout="constrained")
    axes = list(figure.subplots((len(names) + 1) // 2, min(2, len(names)), squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        for label, curve in curves[name].items():
            axis.plot(*zip(*curve, strict=True), label=label)
        ends = [ms for curve in curves[name].values() for ms, share in curve if share <= NEAR_END / 100]
        axis.set(xlabel=f"{METRICS[name][0]} (ms)", ylabel="share", ylim=(0, 1.02), xlim=(0, max(ends) * 1.05 or 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower right")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def draw_points(points: dict[str, list[tuple[float, float, float, float]]]) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axis = figure.subplots()
    for name, found in points.items():
        places, medians, lows, highs = zip(*sorted(found), strict=True)
        below = [max(0.0, median - low) for median, low in zip(medians, lows, strict=True)]
        above = [max(0.0, high - median) for median, high in zip(medians, highs, strict=True)]
        axis.errorbar(places, medians, yerr=[below, above], marker="o", capsize=3, label=name)
    axis.set(xlabel="requests open at once", ylabel="output tokens/s", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def draw_shares(shares: list[tuple[str, float]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.8 + 0.28 * len(shares)), layout="constrained")
    axis = figure.subplots()
    names = [name for name, _ in shares]
    bars = axis.barh(range(len(shares)), [100 * share for _, share in shares], color="#4878a8")
    axis.bar_label(bars, fmt="%.0f %%", padding=3, fontsize="small")
    axis.set_yticks(range(len(shares)), names, fontsize="small")
    axis.invert_yaxis()
    axis.axvline(100, color="#a03030", linewidth=1)
    axis.set(xlabel="% of the limit", xlim=(0, max(110.0, *(115 * share for _, share in shares))))
    return figure


def page(found: Found, figures: list[tuple[str, bytes]], entries: list[dict[str, Any]]) -> Iterator[str]:
    yield "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    yield f"<title>Tandem bench</title><style>{STYLE}</style><h1>Tandem bench</h1>"
    if found.doubts:
        yield f"<details class=warning><summary>{len(found.doubts)} warnings of the instrument</summary>"
        yield "".join(f"<p>{html.escape(doubt)}" for doubt in found.doubts) + "</details>"
    for title, image in figures:
        source = base64.b64encode(image).decode()
        yield f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='data:image/png;base64,{source}'>"
    if found.ratios:
        yield "<h2>Ratios</h2>"
        rows = [
            (pair, name, f"{one['median']:.3f}", f"{one['low']:.3f} – {one['high']:.3f}", f"{one['samples']}")
            for pair, name, one in found.ratios
        ]
        yield from table(("", "figure", "median", "10th – 90th percentile", "rounds"), rows)
    if found.servers:
        yield "<h2>Servers</h2>"
        rows = [(name, *(number(side.get(key)) for key, _ in SHOWN)) for name, side in found.servers]
        yield from table(("", *(heading for _, heading in SHOWN)), rows)
    yield "<h2>How it was measured</h2>"
    for entry in entries:
        yield from about(entry)


def about(entry: dict[str, Any]) -> Iterator[str]:
    """Command, machine and versions of one result."""
    yield f"<p><b>{html.escape(str(entry.get('benchmark', 'result')))}</b>"
    if "command" in entry:
        yield f" <code>{html.escape(str(entry['command']))}</code>"
    for name in ("date", "commit", "model_id", "machine", "versions"):
        if entry.get(name) is not None:
            yield f"<br>{name.removesuffix('_id')}: {html.escape(plain(entry[name]))}"
    yield "</p>"


def plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items() if one is not None)
    return str(value)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{html.escape(heading)}" for heading in headings)
    for row in rows:
        yield "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row)
    yield "</table>"


def number(value: object) -> str:
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
    return "–"


def main(words: Sequence[str] | None = None) -> None:
    """`words`: the command line's, or None for this process's."""
    parser = argparse.ArgumentParser(prog="tandem bench report", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    given = parser.parse_args(words)
    try:
        print(report(given.results, given.out))
    except ReportError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
