"""LoRA adapters that come and go while the server runs, in the words of vLLM (TRL), SGLang (AReaL) and prime-rl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from checkpoints import write_checkpoint
from dialects import IDS, greedy, post
from lora import make_adapter, merge
from servers import Server
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy"), "llama-gqa")


@pytest.fixture(scope="module")
def versions(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[int]]]:
    """Two adapters, and what the policy answers to IDS with each."""
    directory, made = tmp_path_factory.mktemp("adapters"), []
    for seed in (1, 2):
        path = make_adapter(directory / f"v{seed}", _load(policy), seed=seed)
        tuned = merge(_load(policy), path)
        made.append((path, greedy(lambda ids, tuned=tuned: tuned(torch.tensor([ids])).logits[0], IDS, 6)))
    return made


@pytest.fixture(scope="module")
def tuned(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        Server(tmp_path_factory.mktemp("log"), f"policy={policy}", "--max-loras", 2) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        server.wait_ready()
        yield client


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def answer(http: httpx.Client, name: str) -> list[int]:
    body = {"model": name, "prompt": IDS, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    return post(http, "/v1/completions", **body)["choices"][0]["token_ids"]


def test_trl_gives_every_policy_a_name_of_its_own(tuned: httpx.Client, versions: list[tuple[Path, list[int]]]) -> None:
    config = tuned.get("/server_info?config_format=json").json()["vllm_config"]["lora_config"]
    assert config == {"max_loras": 2, "max_lora_rank": 16}
    for number, (path, expected) in enumerate(versions):
        body = {"lora_name": f"trl-policy-v{number}", "lora_path": str(path), "load_inplace": False}
        assert tuned.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert answer(tuned, f"trl-policy-v{number}") == expected
    again = tuned.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400, again.text
    assert answer(tuned, "policy") not in [expected for _, expected in versions]
    for number in (0, 1):
        assert tuned.post("/v1/unload_lora_adapter", json={"lora_name": f"trl-policy-v{number}"}).status_code == 200
    gone = tuned.post("/v1/completions", json={"model": "trl-policy-v0", "prompt": "a"})
    assert gone.status_code == 404


def test_prime_rl_gives_new_weights_the_old_name(tuned: httpx.Client, versions: list[tuple[Path, list[int]]]) -> None:
    for path, expected in versions:
        told = post(tuned, "/load_lora_adapter", lora_name="current", lora_path=str(path))
        assert told["success"] and told["loaded_adapters"] == ["current"]
        assert answer(tuned, "current") == expected
        params = {"max_new_tokens": 6, "temperature": 0}
        assert (
            post(tuned, "/generate", input_ids=IDS, lora_path="current", sampling_params=params)["output_ids"]
            == expected
        )
    assert post(tuned, "/unload_lora_adapter", lora_name="current")["loaded_adapters"] == []


def test_what_is_no_adapter_is_refused(tuned: httpx.Client, tmp_path: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(tmp_path)}
    for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        refused = tuned.post(path, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["message"]
    assert tuned.post("/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404
