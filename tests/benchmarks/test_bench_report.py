"""Pages from results of every bench command, and from vLLM's own files."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tandem.benchmarks.bench.report import Found, ReportError, collect, main, read, report

SPREAD = {"median": 1.5, "low": 1.4, "high": 1.6, "samples": 5}
SERVE: dict[str, Any] = {
    "benchmark": "serve",
    "max_concurrency": 4,
    "command": "tandem bench serve <x>",
    "sides": {
        name: {
            "completed": 3,
            "output_throughput": rate,
            "median_ttft_ms": 12.0,
            "tandem": {"quantiles": {"ttft": {"percent": [0, 50, 100], "ms": [1, 2, 30]}}, "doubts": ["slow <client>"]},
        }
        for name, rate in (("tandem", 200.0), ("vllm", 100.0))
    },
    "ratios": {"tandem / vllm": {"output_throughput": SPREAD}},
}
SERVE["sides"]["tandem"]["spreads"] = {"output_throughput": {"median": 200.0, "low": 190.0, "high": 210.0}}
THROUGHPUT = {
    "benchmark": "throughput",
    "engines": {"tandem": {"fraction_of_limit": {**SPREAD, "median": 0.62}}, "vllm": {}},
    "ratios": {"tandem / vllm": SPREAD},
}
LATENCY = {"benchmark": "latency", "batch_size": 8, "latencies": [0.1, 0.2], "engines": {}, "ratios": {}}
KERNELS = {"benchmark": "kernels", "operations": [{"operation": "matmul", "share": 0.9}, {"operation": "none"}]}
VLLM = {
    "backend": "openai",
    "request_throughput": 1.0,
    "output_throughput": 50.0,
    "completed": 2,
    "max_concurrency": 16,
    "ttfts": [0.1, 0.3],
    "itls": [[0.01, 0.02], []],
}


def found_in(*entries: dict[str, Any]) -> Found:
    found = Found()
    for entry in entries:
        collect(found, entry, "")
    return found


def test_everything_that_can_be_drawn_is_found() -> None:
    found = found_in(SERVE, THROUGHPUT, LATENCY, KERNELS, VLLM)
    assert found.curves["ttft"]["tandem"] == [(1, 0.0), (2, 0.5), (30, 1.0)]
    assert found.curves["ttft"]["openai"][0] == (pytest.approx(100), 0.0)
    assert found.curves["itl"]["openai"][-1] == (pytest.approx(20), 1.0)
    assert found.curves["e2el"]["batch of 8"][50] == (pytest.approx(150), 0.5)
    assert dict(found.points) == {
        "tandem": [(4.0, 200.0, 190.0, 210.0)],
        "vllm": [(4.0, 100.0, 100.0, 100.0)],
        "openai": [(16.0, 50.0, 50.0, 50.0)],
    }
    assert found.shares == [("throughput, tandem", 0.62), ("matmul", 0.9)]
    assert found.ratios == [("tandem / vllm", "output_throughput", SPREAD), ("tandem / vllm", "speed", SPREAD)]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.images += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in ("one", "two")]
    files[0].write_text(json.dumps(SERVE, indent=1))
    files[1].write_text(json.dumps(THROUGHPUT) + "\n" + json.dumps(VLLM) + "\n")  # one result per line
    out = report(files, tmp_path / "deep" / "page.html")
    page = Page(out.read_text())
    assert len(page.images) == 3 and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert not {"script", "link", "x", "client"} & page.tags
    assert "slow <client>" in page.words and "tandem bench serve <x>" in page.words and "1.500" in page.words
    assert {file.name for file in out.parent.iterdir()} == {
        "page.html",
        "page-latency.png",
        "page-concurrency.png",
        "page-limit.png",
    }
    assert (out.parent / "page-limit.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k.json").write_text(json.dumps(KERNELS))
    main([str(tmp_path / "k.json"), "--out", str(tmp_path / "k.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "k.html") and (tmp_path / "k-limit.png").exists()
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "none.json")])
    assert exit.value.code == 2 and "none.json" in capsys.readouterr().err


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for text in ("{", "[1]", "3"):
        bad.write_text(text)
        with pytest.raises(ReportError, match=r"bad\.json"):
            read(bad)
    with pytest.raises(ReportError, match=r"missing\.json"):
        read(tmp_path / "missing.json")
    with pytest.raises(ReportError, match="at least one"):
        report([], tmp_path / "x.html")
