"""A real server with a model in every role: tiny random ones that share a tokenizer, and a judge that has another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from servers import Server

from tandem.server.engine.options import DEMO
from tandem.server.text.text import Text

CONTEXT = 512


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rlhf")
    return {
        "policy": write_checkpoint(root / "policy", "llama-gqa"),
        "sft": write_checkpoint(root / "sft", "llama-gqa", seed=1),
        "reward": write_checkpoint(root / "reward", "llama-reward", seed=2),
        "critic": write_checkpoint(root / "critic", "llama-reward", seed=3),
        "judge": DEMO / "reward",
    }


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferences") / "rankings.jsonl"


@pytest.fixture(scope="session")
def rlhf_server(
    checkpoints: dict[str, Path], preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    roles = {"sft": ",role=reference", "critic": ",role=value,max_model_len=256"}
    models = [f"{name}={path}{roles.get(name, '')}" for name, path in checkpoints.items()]
    options = ["--weights-root", checkpoints["policy"].parent, "--preferences", preferences, "--enable-lora"]
    with Server(tmp_path_factory.mktemp("log"), *models, *options) as server:
        yield server.base_url


@pytest.fixture(scope="session")
def http(rlhf_server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=rlhf_server, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def text(checkpoints: dict[str, Path]) -> Text:
    return Text.load(checkpoints["policy"])


@pytest.fixture(scope="session")
def judge_text(checkpoints: dict[str, Path]) -> Text:
    return Text.load(checkpoints["judge"])


Logprobs = Callable[[list[int], list[int], float], list[float]]


@pytest.fixture(scope="session")
def hf_logprobs(checkpoints: dict[str, Path]) -> Callable[[str], Logprobs]:
    """Of a model, of the tokens of a completion behind its prompt, at a temperature."""

    def of(name: str) -> Logprobs:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval()

        def logprobs(prompt: list[int], completion: list[int], temperature: float) -> list[float]:
            with torch.no_grad():
                rows = (model(torch.tensor([prompt + completion])).logits[0] / temperature).log_softmax(-1)
            return [rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]

        return logprobs

    return of


@pytest.fixture(scope="session")
def hf_values(checkpoints: dict[str, Path]) -> Callable[[list[int]], list[float]]:
    """The critic's, behind every token."""
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["critic"], dtype=torch.float32)

    def values(ids: list[int]) -> list[float]:
        with torch.no_grad():
            hidden = critic.eval().model(torch.tensor([ids])).last_hidden_state
            return critic.score(hidden)[0, :, 0].tolist()

    return values


@pytest.fixture(scope="session")
def ask(http: httpx.Client) -> Callable[..., dict[str, Any]]:
    def post(path: str, /, **body: object) -> dict[str, Any]:
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture(scope="session")
def computed(http: httpx.Client) -> Callable[[str], int]:
    """Tokens that a model has computed so far."""

    def tokens(model: str) -> int:
        found = re.search(
            rf'^tandem:computed_tokens_total\{{model_name="{model}".*\}} (\S+)$', http.get("/metrics").text, re.M
        )
        assert found is not None
        return int(float(found[1]))

    return tokens


@pytest.fixture(scope="session")
def reward_of(ask: Callable[..., dict[str, Any]]) -> Callable[..., float]:
    def reward(model: str, whole: str | list[int]) -> float:
        return ask("/v1/rewards", model=model, input=whole)["data"][0]["reward"]

    return reward
