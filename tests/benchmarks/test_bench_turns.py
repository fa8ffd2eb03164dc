"""`tandem bench` with another engine beside Tandem: each in a process of its own, in turns, the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from tandem.benchmarks.bench import limits
from tandem.benchmarks.bench.cli import app


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(limits, "READ_BYTES", 16 << 20)
    monkeypatch.setattr(limits, "SIZES", (128,))
    yield
    torch.set_num_threads(threads)


def measured(tmp_path: Path, *words: str | Path | int) -> tuple[list[str], dict[str, Any]]:
    """Lines and JSON."""
    file = tmp_path / "result.json"
    given = (*words, "--engine", "tandem,transformers", "--dtype", "float32", "--threads", 1, "--output-json", file)
    found = CliRunner().invoke(app, [str(word) for word in given])
    assert found.exit_code == 0, found.output
    return found.stdout.splitlines(), json.loads(file.read_text())


def test_engines_take_turns_and_give_the_same_lengths(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "llama", "llama-gqa")
    words = ("--num-prompts", 3, "--input-len", 9, "--output-len", 4, "--runs", 2, "--warmups", 1)
    lines, found = measured(tmp_path, "throughput", "--model", model, *words)
    assert list(found["engines"]) == ["tandem", "transformers"]
    seconds = {name: one["elapsed_times"] for name, one in found["engines"].items()}
    quotients = [theirs / own for own, theirs in zip(seconds["tandem"], seconds["transformers"], strict=True)]
    assert found["ratios"]["tandem / transformers"]["median"] == pytest.approx(np.median(quotients))
    assert found["elapsed_time"] == pytest.approx(np.median(seconds["tandem"])), "vLLM's keys are the first engine's"
    assert found["engines"]["transformers"]["versions"]["transformers"]
    assert any(line.strip().startswith("speed, tandem / transformers:") for line in lines)
    assert found["total_num_tokens"] == 3 * 13


def test_transformers_gives_the_same_scores(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "judge", "llama-reward", pad_token_id=0)
    words = ("--groups", 2, "--answers", 3, "--prompt-len", 20, "--answer-len", 7, "--runs", 1, "--warmups", 0)
    lines, found = measured(tmp_path, "score", "--model", model, *words)
    assert list(found["sides"]) == ["shared", "unshared", "transformers"]
    assert found["max_score_difference"]["transformers"] < 1e-4 * found["score_spread"]
    assert set(found["ratios"]) == {"shared / unshared", "shared / transformers"}
    assert any("largest difference, shared and transformers" in line for line in lines)
