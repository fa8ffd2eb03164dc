"""New weights in the words of SGLang, AReaL, prime-rl and vLLM: from disk, and by broadcast from this process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
import transformers
from checkpoints import write_checkpoint
from dialects import IDS, greedy, post
from servers import Server
from torch.distributed import distributed_c10d as c10d


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sets of weights for one model."""
    return [write_checkpoint(tmp_path_factory.mktemp(f"step-{seed}"), "llama-gqa", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def expected(checkpoints: list[Path]) -> list[list[int]]:
    """What each answers to IDS."""
    return [greedy(_logits(path), IDS, 6) for path in checkpoints]


@pytest.fixture(scope="module")
def trainee(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    reward = write_checkpoint(tmp_path_factory.mktemp("reward"), "llama-reward")
    models, root = [f"policy={checkpoints[0]}", f"reward={reward}"], tmp_path_factory.getbasetemp()
    with (
        Server(tmp_path_factory.mktemp("log"), *models, "--weights-root", root) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        server.wait_ready()
        yield client


def _logits(path: Path) -> Callable[[list[int]], torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0]

    return logits


def answer(http: httpx.Client) -> tuple[list[int], str]:
    """Its tokens, and what its weights are called."""
    params = {"max_new_tokens": 6, "temperature": 0}
    found = post(http, "/generate", input_ids=IDS, sampling_params=params)
    return found["output_ids"], found["meta_info"]["weight_version"]


def test_from_disk_in_every_dialect(trainee: httpx.Client, checkpoints: list[Path], expected: list[list[int]]) -> None:
    old, new = map(str, checkpoints)
    assert answer(trainee)[0] == expected[0] != expected[1]
    told = post(trainee, "/update_weights_from_disk", model_path=new, load_format=None, weight_version="step-1")
    assert told == {"success": True, "message": told["message"], "num_paused_requests": 0}
    assert answer(trainee) == (expected[1], "step-1")
    assert post(trainee, "/areal_update_weights", model_path=old)["success"]
    assert answer(trainee)[0] == expected[0]
    post(trainee, "/pause?mode=keep&clear_cache=false")
    assert trainee.post("/update_weights", json={"weight_dir": new}).status_code == 200
    post(trainee, "/resume")
    assert answer(trainee)[0] == expected[1]
    assert post(trainee, "/update_weights_from_disk", model_path=old, abort_all_requests=True)["success"]


def test_what_cannot_be_loaded_leaves_the_old_weights(
    trainee: httpx.Client, tmp_path: Path, expected: list[list[int]]
) -> None:
    other = write_checkpoint(tmp_path / "wide", "llama-gqa", hidden_size=96, head_dim=16)
    for path in (other, tmp_path / "nothing"):
        refused = trainee.post("/update_weights_from_disk", json={"model_path": str(path)})
        assert refused.status_code == 400 and refused.json()["error"]["message"], refused.text
    assert refused.json()["error"]["param"] == "model_path"
    assert answer(trainee)[0] == expected[0]


@pytest.mark.parametrize("packed", [False, True])
def test_by_broadcast_in_vllms_words(
    trainee: httpx.Client, checkpoints: list[Path], expected: list[list[int]], packed: bool
) -> None:
    """This process is the trainer, rank 0. From vLLM 0.28 on the group says whether broadcasts are packed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[1], dtype=torch.float32)
    named = [(name, parameter.data.contiguous()) for name, parameter in model.named_parameters()]
    update = {
        "names": [name for name, _ in named],
        "dtype_names": ["float32" for _ in named],
        "shapes": [list(tensor.shape) for _, tensor in named],
    }
    info = {"master_address": "127.0.0.1", "rank_offset": 1, "world_size": 2, "packed": packed, "backend": "gloo"}
    with ThreadPoolExecutor(1) as pool:
        port = _free_port()
        ready = pool.submit(
            lambda: post(trainee, "/init_weight_transfer_engine", init_info=info | {"master_port": port})
        )
        with trainer(port) as send:
            assert ready.result(60)["message"]
            for path, body in (("/pause?mode=keep", {}), ("/start_weight_update", {"is_checkpoint_format": True})):
                post(trainee, path, **body)
            received = pool.submit(lambda: post(trainee, "/update_weights", update_info=update))
            for tensor in [flattened(named)] if packed else [tensor for _, tensor in named]:
                send(tensor)
            assert received.result(60)["message"]
    assert trainee.post("/finish_weight_update").status_code == 200
    post(trainee, "/resume")
    assert answer(trainee)[0] == expected[1]
    assert post(trainee, "/update_weights_from_disk", model_path=str(checkpoints[0]))["success"]


def test_by_broadcast_in_sglangs_words(
    trainee: httpx.Client, checkpoints: list[Path], expected: list[list[int]]
) -> None:
    """A part of the tensors at a time, and in one flattened bucket."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[1], dtype=torch.float32)
    named = [(name, parameter.data.contiguous()) for name, parameter in model.named_parameters()]
    group_info: dict[str, Any] = {"master_address": "127.0.0.1", "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    with ThreadPoolExecutor(1) as pool:
        port = _free_port()
        body = group_info | {"master_port": str(port), "group_name": "slime"}
        ready = pool.submit(lambda: post(trainee, "/init_weights_update_group", **body))
        with trainer(port, "slime") as send:
            assert ready.result(60)["success"]
            for part, load_format in ((named[:5], None), (named[5:], "flattened_bucket")):
                body = {
                    "names": [name for name, _ in part],
                    "dtypes": ["torch.float32" for _ in part],
                    "shapes": [list(tensor.shape) for _, tensor in part],
                    "group_name": "slime",
                    "load_format": load_format,
                }
                received = pool.submit(lambda body=body: post(trainee, "/update_weights_from_distributed", **body))
                for tensor in [flattened(part)] if load_format else [tensor for _, tensor in part]:
                    send(tensor)
                assert received.result(60)["success"]
    assert answer(trainee)[0] == expected[1]
    assert post(trainee, "/destroy_weights_update_group", group_name="slime")["success"]
    assert post(trainee, "/update_weights_from_disk", model_path=str(checkpoints[0]))["success"]


def flattened(named: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in named])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def trainer(port: int, name: str = "") -> Iterator[Any]:
    """Rank 0 of a group of two, which has waited for the server: torch's own, or one beside it, as slime and AReaL
    make it. What it gives sends a tensor."""
    wait, method = timedelta(seconds=60), f"tcp://127.0.0.1:{port}"
    if not name:
        dist.init_process_group("gloo", init_method=method, rank=0, world_size=2, timeout=wait)
        try:
            yield lambda tensor: dist.broadcast(tensor, 0)
        finally:
            dist.destroy_process_group()
        return
    store, rank, size = next(dist.rendezvous(method, 0, 2, timeout=wait))
    store = dist.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(size, rank, [], "gloo", store, name, timeout=wait)
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    yield lambda tensor: dist.broadcast(tensor, 0, group=group)
