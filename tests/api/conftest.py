"""The real server on tiny random checkpoints, once for the session, and the clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from checkpoints import make_model, write_checkpoint
from lora import make_adapter
from oracles import scorer
from servers import Server
from shapes import check_response

from tandem.server.text.text import Text

CONTEXT = 2048


@pytest.fixture(scope="session")
def context() -> int:
    return CONTEXT


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    return write_checkpoint(path, "llama-gqa", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    return write_checkpoint(path, "llama-reward", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def server(policy: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The policy's checkpoint serves a second time, without its head."""
    models = [f"policy={policy},alias=org/alias", f"reward={reward}", f"embed={policy},role=embedding,pooling=mean"]
    with Server(tmp_path_factory.mktemp("log"), *models) as server:
        yield server.base_url


@pytest.fixture(scope="session")
def narrow_server(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One sequence at a time, eight requests may wait, little patience, small bodies, keys, and an adapter."""
    adapter = make_adapter(tmp_path_factory.mktemp("poet"), make_model("llama-gqa"), "q_proj", "down_proj", size=1.0)
    options = ["--max-num-seqs", 1, "--max-waiting-requests", 8, "--stream-timeout", 1, "--max-logprobs", 300]
    keys = ["--api-key", "first-key", "--api-key", "second-key"]
    options += ["--max-body", 4096, "--ignore-unknown-fields", "--lora-modules", f"poet={adapter}"]
    with Server(tmp_path_factory.mktemp("log"), f"policy={policy}", *options, *keys) as server:
        yield server.base_url


@pytest.fixture(scope="session")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60, event_hooks={"response": [check_response]}) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(timeout=60, event_hooks={"response": [check_response]})
    with openai.OpenAI(
        base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60, http_client=http_client
    ) as client:
        yield client


@pytest.fixture
async def aclient(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def narrow_http(narrow_server: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": "Bearer second-key"}
    async with httpx.AsyncClient(base_url=narrow_server, timeout=60, headers=headers) as client:
        yield client


@pytest.fixture(scope="session")
def text(policy: Path) -> Text:
    return Text.load(policy)


@pytest.fixture(scope="session")
def greedy_text(policy: Path, text: Text) -> Callable[[list, int], tuple[str, int]]:
    """What transformers answers to a chat: the text, and how many tokens it took."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()

    def generate(messages: list, max_tokens: int) -> tuple[str, int]:
        ids = torch.tensor([text.render(messages)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        answer = out[0, ids.shape[1] :].tolist()
        return text.decode(answer), len(answer)

    return generate


@pytest.fixture(scope="session")
def hf_score(reward: Path) -> Callable[[list[int]], float]:
    return scorer(reward)


@pytest.fixture(scope="session")
def hf_embed(policy: Path) -> Callable[[list[int]], torch.Tensor]:
    import transformers

    model = transformers.AutoModel.from_pretrained(policy, dtype=torch.float32).eval()

    def embed(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0].mean(0)

    return embed
