"""POST /v1/rlhf/weights: new weights from disk and from shared memory, and paths that are not read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import refused
from checkpoints import make_model, write_checkpoint
from lora import make_adapter

PATH = "/v1/rlhf/weights"
HANDLE = {"name": "a", "dtype": "float32", "device": 0, "storage_bytes": 4, "handle": "", "counter": "", "event": ""}
GREEDY = {"model": "policy", "prompt": [1, 70, 75], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def other(checkpoints: dict[str, Path]) -> Path:
    return write_checkpoint(checkpoints["policy"].parent / "other", "llama-gqa", seed=9)


@pytest.fixture(autouse=True)
def afterwards(ask: Ask) -> Iterator[None]:
    yield
    ask(PATH, model="policy", source="disk", path="policy", version="as at first")


def tokens(ask: Ask) -> tuple[list[int], int]:
    answer = ask("/v1/completions", **GREEDY)
    return answer["choices"][0]["token_ids"], answer["weight_version"]


def test_from_disk(ask: Ask, http: httpx.Client, other: Path) -> None:
    group = {"prompt_token_ids": [1, 70], "completions": [{"token_ids": [75, 80]}]}
    asked = {"groups": [group], "want": ["policy_logprobs", "ref_logprobs"]}
    before, version = tokens(ask)
    old = ask("/v1/rlhf/evaluate", **asked)
    answer = ask(PATH, model="policy", source="disk", path=str(other), version="step-8")
    assert answer["version"] > version and answer["label"] == "step-8" and answer["models"] == ["policy"]
    assert answer["tensors"] == 21 and answer["bytes"] > 100_000 and answer["seconds"] > 0
    after, now = tokens(ask)
    assert now == answer["version"] and after != before
    new = ask("/v1/rlhf/evaluate", **asked)
    (was,), (is_now,) = ((one["groups"][0]["completions"]) for one in (old, new))
    assert was["ref_logprobs"] == is_now["ref_logprobs"]  # bit for bit
    assert was["policy_logprobs"] != pytest.approx(is_now["policy_logprobs"], abs=1e-2)
    shown = {one["model"]: one for one in http.get(PATH).json()["data"]}
    assert (shown["policy"]["version"], shown["policy"]["label"]) == (now, "step-8")
    ask(PATH, model="policy", source="disk", path="policy")
    assert tokens(ask)[0] == before


def test_from_shared_memory(ask: Ask, other: Path) -> None:
    before, _ = tokens(ask)
    content = (other / "model.safetensors").read_bytes()
    memory = SharedMemory(create=True, size=len(content))
    try:
        memory.buf[: len(content)] = content
        answer = ask(PATH, model="policy", source="shm", path=memory.name, size=len(content))
    finally:
        memory.close()
        memory.unlink()
    assert answer["bytes"] > 100_000 and tokens(ask)[0] != before


def test_an_adapter_beside_the_model_and_as_its_own(ask: Ask, http: httpx.Client, checkpoints: dict[str, Path]) -> None:
    path = make_adapter(checkpoints["policy"].parent / "adapter", make_model("llama-gqa"), "q_proj", "v_proj", size=2.0)
    before, version = tokens(ask)
    beside = ask(PATH, model="policy", source="lora", path="adapter", adapter="tuned")
    assert beside["adapters"] == ["tuned"]
    tuned = ask("/v1/completions", **{**GREEDY, "model": "tuned"})["choices"][0]["token_ids"]
    assert tuned != before and tokens(ask) == (before, version)
    group = {"prompt_token_ids": GREEDY["prompt"], "completions": [{"token_ids": before}]}
    asked = {"groups": [group], "want": ["kl"], "models": {"policy": "tuned", "reference": "policy"}}
    (one,) = ask("/v1/rlhf/evaluate", **asked)["groups"][0]["completions"]
    assert max(map(abs, one["kl"])) > 0.01
    own = ask(PATH, model="policy", source="lora", path=str(path), version="step-9")
    assert (own["label"], own["version"] > version) == ("step-9", True)
    assert tokens(ask) == (tuned, own["version"])


def test_no_path_outside_the_root(http: httpx.Client, other: Path, tmp_path: Path) -> None:
    link = other.parent / "link"
    link.symlink_to(tmp_path)
    shutil.copytree(other, tmp_path / "copy")
    for path in (tmp_path / "copy", "../..", "/etc", link / "copy", "link"):
        refused(http, PATH, {"model": "policy", "source": "disk", "path": str(path)}, "path", "outside --weights-root")
    link.unlink()
    refused(http, PATH, {"model": "policy", "source": "disk", "path": "nothing"}, "path", "there is nothing at")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"source": "disk"}, "path", "missing"),
        ({"source": "disk", "path": "policy", "handles": []}, "handles", "at least 1"),
        ({"source": "disk", "path": "policy", "size": 5}, "size", "not for source 'disk'"),
        ({"source": "disk", "path": "policy", "adapter": "a"}, "adapter", "not for source 'disk'"),
        ({"source": "lora", "path": "policy", "adapter": "a", "version": "8"}, "version", "beside them"),
        ({"source": "cuda_ipc"}, "handles", "missing"),
        ({"source": "cuda_ipc", "handles": [HANDLE | {"shape": [2**63]}]}, "handles[0].shape[0]", "less than"),
        ({"source": "ftp"}, "source", "disk"),
        ({"source": "disk", "path": "policy", "role": "policy"}, "role", "model names"),
        ({"source": "disk", "path": "policy", "in_flight": "drop"}, "in_flight", "keep"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {"model": "policy", **body}, param, words)


def test_an_unknown_model(http: httpx.Client) -> None:
    also = {"model": "policy", "source": "disk", "path": "policy", "also": ["none"]}
    refused(http, PATH, also, "also", "not hosted here", 404)
    refused(http, PATH, {"model": "none", "source": "disk", "path": "policy"}, "model", "not hosted here", 404)
