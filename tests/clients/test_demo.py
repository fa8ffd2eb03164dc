"""What a new user meets: `tandem serve` without arguments, an unmodified `openai` client, and how soon it answers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from servers import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("log")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_conversation(client: openai.OpenAI) -> None:
    messages: list[dict[str, str]] = []
    for question, wanted in (("Hello!", ""), ("What is 17 + 25?", "42"), ("What is the capital of France?", "Paris")):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="tandem-demo", messages=messages, temperature=0)  # type: ignore[arg-type]
        text = answer.choices[0].message.content or ""
        assert answer.choices[0].finish_reason == "stop", text
        assert wanted in text, f"{question} -> {text}"
        messages.append({"role": "assistant", "content": text})


def test_a_streamed_answer_is_the_plain_one(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "法国的首都是哪里?"}]
    asked = {"model": "tandem-demo", "messages": question, "temperature": 0}
    plain = client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload]
    stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == plain
    assert "巴黎" in plain


def test_the_reward_model_prefers_the_right_answer(server: Server) -> None:
    def conversation(answer: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": f"The capital of France is {answer}."},
        ]

    body = {"model": "tandem-demo-reward", "conversations": [conversation("Paris"), conversation("Oslo")]}
    right, wrong = httpx.post(f"{server.base_url}/v1/rewards", json=body, timeout=60).raise_for_status().json()["data"]
    assert right["reward"] > wrong["reward"]


def test_langchain_streams(server: Server) -> None:
    chat = ChatOpenAI(base_url=f"{server.base_url}/v1", api_key="none", model="tandem-demo", temperature=0)
    plain = chat.invoke("What is the capital of Japan?")
    assert "Tokyo" in plain.content
    assert "".join(str(piece.content) for piece in chat.stream("What is the capital of Japan?")) == plain.content


def test_the_first_token_comes_soon(capsys: pytest.CaptureFixture[str]) -> None:
    """The goal is 5 s on two idle cores; CI's may be busy, so what is asserted is a multiple of `import torch` now."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch_seconds = time.monotonic() - began
    command = [sys.executable, "-m", "tandem.benchmarks.bench.startup", "--runs", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with capsys.disabled():
        print(f"\n{result.stdout}")
    first = next(float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("first_token"))
    assert first <= max(5.0, 2 * torch_seconds + 3.0)
