"""Percentiles, spreads, rounds, results: against numpy and by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tandem.benchmarks.bench import result
from tandem.benchmarks.bench.stats import Spread, interleaved, percentile, ratio, spread


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count: int) -> None:
    values = [random.Random(count).gauss(0, 10) for _ in range(count)]
    for p in (0, 1, 10, 25, 50, 75, 90, 99, 99.9, 100):
        assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-12, abs=1e-12)


def test_what_has_no_percentile_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    for p in (-1, 100.1):
        with pytest.raises(ValueError, match="from 0 to 100"):
            percentile([1.0], p)


def test_a_spread_is_median_and_the_middle_80_percent() -> None:
    assert spread([float(n) for n in range(10, -1, -1)]) == Spread(median=5.0, low=1.0, high=9.0, samples=11)


def test_rounds_turn_their_order_around() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str):
        def call(number: int) -> str:
            calls.append((name, number))
            return f"{name}{number}"

        return call

    heard: list[tuple[str, int]] = []
    found = interleaved({n: side(n) for n in "ABC"}, 3, 1, lambda name, number: heard.append((name, number)))
    assert [name for name, _ in calls] == [*"CBA", *"ABC", *"CBA", *"ABC"]
    assert [number for _, number in calls] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert found == {name: [f"{name}0", f"{name}1", f"{name}2"] for name in "ABC"}, "warm-ups are no results"
    assert heard == calls
    with pytest.raises(ValueError, match="0 rounds"):
        interleaved({"A": side("A")}, 0)


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine becomes half as fast: the sides' medians drift, their ratio does not."""
    assert ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == Spread(0.5, 0.5, 0.5, 3)
    with pytest.raises(ValueError, match="2 rounds against 1"):
        ratio([1.0, 2.0], [1.0])


def test_a_result_says_what_it_was_measured_with(tmp_path: Path) -> None:
    found = result.describe()
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(found["commit"].removesuffix("+changed")) == 40
    file = tmp_path / "new" / "result.json"
    result.save(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    history = tmp_path / "history.jsonl"
    for number in (1, 2):
        result.append(history, {"n": number, "text": "ä\n"})
    assert [json.loads(line)["n"] for line in history.read_text().splitlines()] == [1, 2]


def test_the_command_is_told_without_places(tmp_path: Path) -> None:
    code = "from tandem.benchmarks.bench import result; print(result.command())"
    script = tmp_path / "tandem"
    script.write_text(code)
    command = [sys.executable, str(script), "bench", "--model", "a b"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said == "tandem bench --model 'a b'"
