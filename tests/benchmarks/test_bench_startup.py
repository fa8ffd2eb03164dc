"""`tandem bench startup`: what is compared with what, and what a cold start is. A real start is in tests/clients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.benchmarks.bench import startup
from tandem.benchmarks.bench.startup import PeerStart, Start


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started, in order; nothing is, and it takes the times below. No file leaves the page cache."""
    names: list[str] = []
    forgotten: list[Path] = []
    seconds = {"accepts": 0.5, "ready": 2.0, "first_token": 2.5, "done": 3.0, "first_reward": None}

    def measure(arguments: Any, timeout: float, environment: Any = None) -> Start:
        names.append("cold tandem" if environment else "tandem")
        late = len(names) / 10
        return Start(**{name: value and value + late for name, value in seconds.items()})

    def import_torch(environment: Any = None) -> float:
        names.append("cold torch" if environment else "torch")
        return 1.0

    def peer(name: str, *given: Any) -> PeerStart:
        names.append(name)
        return PeerStart(20.0, 30.0)

    monkeypatch.setattr(startup, "forget", lambda file: forgotten.append(file))
    monkeypatch.setattr(startup, "measure", measure)
    monkeypatch.setattr(startup, "import_torch", import_torch)
    monkeypatch.setattr(startup, "peer", peer)
    return names


def test_every_side_takes_its_turn(started: list[str], tmp_path: Path) -> None:
    found = startup.run(["x"], runs=2, cold_runs=1, peers=["vllm"], model=tmp_path)
    assert started == ["cold torch", "cold tandem", "torch", "tandem", "vllm", "vllm", "tandem", "torch"]
    assert found["medians"] == pytest.approx({"accepts": 1.05, "ready": 2.55, "first_token": 3.05, "done": 3.55})
    assert found["import_torch"] == 1.0 and found["first_token_after_import_torch"] == pytest.approx(2.05)
    assert found["cold"]["medians"]["ready"] == pytest.approx(2.2) and found["cold"]["import_torch"] == 1.0
    assert found["sooner"]["vllm"]["ready"]["median"] == pytest.approx((20 / 2.4 + 20 / 2.7) / 2)
    assert found["sooner"]["vllm"]["first_token"]["low"] < 30 / 2.9
    lines = startup.lines(found)
    assert any(line.split() == ["import", "torch", "(same", "run)", "1.00", "1.00", "1.00"] for line in lines)
    assert any(line.startswith("first_token - import torch") and "2.05" in line for line in lines)
    assert any(line.startswith("vllm ready") and "times as long as Tandem" in line for line in lines)


def test_a_peer_needs_a_checkpoint(started: list[str]) -> None:
    with pytest.raises(ValueError, match="vllm needs --model"):
        startup.run([], runs=1, peers=["vllm"])


def test_a_cold_process_compiles_its_modules_again(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x" * 8192)
    code = "import json.tool, sys; print(json.tool.__cached__)"
    with startup.cold([tmp_path]) as environment:
        bytecode = Path(environment["PYTHONPYCACHEPREFIX"])
        assert not list(bytecode.iterdir())
        given = {**os.environ, **environment}
        said = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
        assert Path(said.stdout.strip()).is_relative_to(bytecode)
    assert not bytecode.exists() and weights.read_bytes() == b"x" * 8192
