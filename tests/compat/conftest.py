"""The real server on tiny random checkpoints, and transformers on the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from checkpoints import write_checkpoint
from oracles import scorer
from servers import Server

from tandem.server.text.text import Text

Matrix = list[list[float]]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy"), "llama-gqa")


@pytest.fixture(scope="session")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("reward"), "llama-reward")


@pytest.fixture(scope="session")
def server(policy: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = [f"policy={policy}", f"reward={reward}", f"embed={policy},role=embedding,pooling=mean"]
    with Server(tmp_path_factory.mktemp("log"), *models, "--max-logprobs", 100) as server:
        server.wait_ready()
        yield server.base_url


@pytest.fixture(scope="session")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def text(policy: Path) -> Text:
    return Text.load(policy)


@pytest.fixture(scope="session")
def hf_score(reward: Path) -> Callable[[list[int]], float]:
    return scorer(reward)


@pytest.fixture(scope="session")
def hf_logits(policy: Path) -> Callable[[list[int]], torch.Tensor]:
    """[T, V]: what follows each token."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return logits
