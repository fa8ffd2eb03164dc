"""Figures and lines of a run whose records are written by hand: every number can be checked with a pencil."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tandem.benchmarks.bench.client import Outcome, Record
from tandem.benchmarks.bench.metrics import Selection, block, doubts, measure, median_of, our_lines

EVERYTHING = Selection(("ttft", "tpot", "itl", "e2el"), (50.0, 99.5), {"ttft": 150.0, "tpot": 30.0})


def record(start: float, *times: float, tokens: int | None = None, **more: Any) -> Record:
    given = {"due": start, "start": start, "times": list(times), "end": times[-1], "completion_tokens": tokens}
    return Record(**{**given, **more})


def outcome(*records: Record, **more: Any) -> Outcome:
    given: dict[str, Any] = {"began": 10.0, "ended": 14.0, "cpu_seconds": 0.4, "busiest": 0.2, "lags": [0.001]}
    return Outcome(list(records), **{**given, "reads": 0, "events": 0, **more})


RUN = outcome(
    record(10.0, 0.100, 0.120, 0.140, tokens=3, prompt_tokens=20, cached_tokens=10, text="abc"),  # tpot 20 ms
    record(10.5, 0.200, 0.300, tokens=5, prompt_tokens=30, cached_tokens=0),  # tpot 25 ms, too late for goodput
    record(11.0, 0.050, tokens=1, prompt_tokens=50, cached_tokens=20),  # one token: no tpot
    record(12.0, 0.100, 0.200, tokens=2, prompt_tokens=0),  # tpot 100 ms, bad
    record(12.5, 0.010, error="HTTP 500: x", tokens=9, prompt_tokens=1000),
)


def test_figures_follow_vllms_definitions() -> None:
    found = measure(RUN, [0] * 5, EVERYTHING)
    assert (found["completed"], found["failed"], found["duration"]) == (4, 1, 4.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (100, 11)
    assert found["request_throughput"] == 1.0
    assert found["output_throughput"] == pytest.approx(11 / 4)
    assert found["total_token_throughput"] == pytest.approx(111 / 4)
    assert found["request_goodput"] == pytest.approx(2 / 4)  # the first, and the third, whose tpot is none
    assert found["mean_ttft_ms"] == pytest.approx(112.5)
    assert found["median_ttft_ms"] == pytest.approx(100)
    assert found["std_ttft_ms"] == pytest.approx(54.4862, abs=1e-3)
    assert found["mean_tpot_ms"] == pytest.approx((20 + 25 + 100) / 3)
    assert found["median_itl_ms"] == pytest.approx(60)  # 20, 20, 100, 100
    assert found["mean_e2el_ms"] == pytest.approx((140 + 300 + 50 + 200) / 4)
    assert found["p99.5_e2el_ms"] == pytest.approx(298.5)
    assert found["p50_ttft_ms"] == found["median_ttft_ms"]
    assert found["itls"][0] == pytest.approx([0.02, 0.02]) and found["errors"][4] == "HTTP 500: x"
    assert found["output_lens"] == [3, 5, 1, 2, 0] and found["latencies"][1] == 0.3
    assert found["max_output_tokens_per_s"] == pytest.approx(8) and found["max_concurrent_requests"] == 2


def test_ours_say_where_tokens_came_from() -> None:
    ours = measure(RUN, [0] * 5, EVERYTHING)["tandem"]
    assert ours["tokens_counted_by"] == "usage" and ours["failures"] == {"HTTP 500: x": 1}
    assert ours["prefix_cache_share"] == pytest.approx(30 / 100) and ours["peak_open_requests"] == 1
    assert ours["tokens_per_chunk"] == pytest.approx(11 / 8)
    assert ours["client"]["cpu_share"] == pytest.approx(0.1)
    assert ours["quantiles"]["ttft"]["ms"][0] == pytest.approx(50)
    assert ours["quantiles"]["ttft"]["ms"][-1] == pytest.approx(200)

    silent = measure(outcome(record(10.0, 0.1, 0.2, 0.3), record(10.0, 0.1, tokens=7)), [4, 6], EVERYTHING)
    assert silent["tandem"]["tokens_counted_by"] == "chunks and usage"
    assert (silent["total_input_tokens"], silent["total_output_tokens"]) == (10, 3 + 7)
    assert silent["tandem"]["prefix_cache_share"] is None


def test_nothing_that_failed_is_a_figure() -> None:
    found = measure(outcome(record(10.0, 0.1, error="no"), record(10.0, 0.1, error="no")), [1, 1], EVERYTHING)
    assert (found["completed"], found["failed"], found["output_throughput"]) == (0, 2, 0.0)
    assert found["median_ttft_ms"] == 0.0 and found["tandem"]["quantiles"] == {}
    assert found["tandem"]["failures"] == {"no": 2}


def test_the_block_is_vllms() -> None:
    found = measure(RUN, [0] * 5, EVERYTHING)
    shown = list(block(found, Selection(("ttft", "e2el"), (99.0, 50.0), {"ttft": 1.0}), 8, 2.5))
    assert shown[0] == "============ Serving Benchmark Result ============"
    assert shown[1:6] == [
        "Successful requests:                     4         ",
        "Failed requests:                         1         ",
        "Maximum request concurrency:             8         ",
        "Request rate configured (RPS):           2.50      ",
        "Benchmark duration (s):                  4.00      ",
    ]
    assert "Request goodput (req/s):                 0.50      " in shown
    assert "Output token throughput (tok/s):         2.75      " in shown
    assert "---------------Time to First Token----------------" in shown
    assert "P50 TTFT (ms):                           100.00    " in shown
    assert "----------------End-to-end Latency----------------" in shown
    assert not any("TPOT" in text for text in shown) and shown[-1] == "=" * 50
    unlimited = list(block(found, Selection(), None, math.inf))
    assert not any("concurrency:" in text or "configured" in text for text in unlimited)
    assert "-----Time per Output Token (excl. 1st token)------" in unlimited


def test_our_lines_show_failures_and_processes() -> None:
    found = measure(RUN, [0] * 5, EVERYTHING)
    found["tandem"] |= {"others_cpu_cores": 0.25, "server": {"not_measured": "another machine"}}
    shown = "\n".join(our_lines(found))
    assert "failed     1x  HTTP 500: x" in shown and "not measured: another machine" in shown
    process = {"pid": 7, "name": "engine", "cpu_seconds": 1.5, "peak_rss": 3 << 20, "cpu_us_per_output_token": 12.5}
    server = {"cpu_seconds": 1.5, "cpu_us_per_output_token": 12.5, "processes": [process]}
    found["tandem"]["server"] = server
    shown = "\n".join(our_lines(found))
    assert "  engine (7)                                 12.50      1.50             3" in shown
    assert "Server CPU per output token (us):        12.50" in shown


def test_an_instrument_that_is_in_the_way_says_so() -> None:
    def said(on_time: bool = True, **more: Any) -> str:
        return " ".join(doubts(measure(outcome(record(10.0, 0.1, tokens=1), **more), [0], EVERYTHING), on_time))

    assert said() == ""
    assert "95% of a core" in said(busiest=0.95)
    assert "fired 9.0 ms late" in said(lags=[0.009])
    late = outcome(record(10.02, 0.1, tokens=1, due=10.0))
    assert "left 20.0 ms after" in " ".join(doubts(measure(late, [0], EVERYTHING), on_time=True))
    assert doubts(measure(late, [0], EVERYTHING), on_time=False) == []
    assert "1 of 5 requests failed" in " ".join(doubts(measure(RUN, [0] * 5, EVERYTHING), on_time=False))
    chunks = outcome(record(10.0, 0.1))
    assert "without usage" in " ".join(doubts(measure(chunks, [0], EVERYTHING), on_time=True))


def test_a_median_of_runs_goes_figure_by_figure() -> None:
    runs = [measure(outcome(record(10.0, ttft, 2 * ttft, tokens=n)), [0], Selection()) for ttft, n in RUNS]
    found = median_of(runs)
    assert found["median_ttft_ms"] == pytest.approx(200) and found["total_output_tokens"] == 20
    assert found["tandem"]["client"]["cpu_share"] == pytest.approx(0.1)
    assert found["itls"] == runs[2]["itls"]  # of the run in the middle


RUNS = ((0.1, 30), (0.3, 10), (0.2, 20))
