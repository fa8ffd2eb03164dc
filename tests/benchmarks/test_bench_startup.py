"""`tandem bench startup`: what is compared with what, and what a cold start is. A real start is in tests/clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.benchmarks.bench import startup
from tandem.benchmarks.bench.startup import PeerStart, Start


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started, in order; nothing is, and it takes the times below. No file leaves the page cache."""
    names: list[str] = []
    forgotten: list[Path] = []
    seconds = {"accepts": 0.5, "ready": 2.0, "first_token": 2.5, "done": 3.0, "first_reward": None}

    def measure(arguments: Any, timeout: float, environment: Any = None, chat: bool = True) -> Start:
        assert not chat, "a checkpoint may have no template"
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
    assert any(line.startswith("first_token - import torch") and line.endswith("2.05") for line in lines)
    assert any("2.05   (goal: at most 1.5)" in line for line in startup.lines(found | {"serve": []}))
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


@pytest.mark.parametrize("chat", [True, False])
def test_the_first_event_with_text_is_the_first_token(chat: bool) -> None:
    """A chat's first event names the role alone."""
    chats = ({"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "4"}}, {"delta": {"content": "2"}})
    events = [{"choices": [choice]} for choice in (chats if chat else ({"text": ""}, {"text": "42"}))]
    came: list[float] = []

    class Events(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for event in events:
                came.append(time.monotonic())
                yield f"data: {json.dumps(event)}\n\n".encode()
                time.sleep(0.02)
            yield b"data: [DONE]\n\n"

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == ("/v1/chat/completions" if chat else "/v1/completions")
        return httpx.Response(200, stream=Events())

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        first, done = startup.first_token(client, chat)
    expected = came[1] if chat else came[0]
    assert expected <= first < expected + 0.02 and done >= came[-1] + 0.02
