"""Weights by broadcast: a trainer in another process, which knows torch.distributed alone, and the engine over gloo."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hubs import answer, generate, make_hub, prompt
from safetensors.torch import load_file

from tandem.server.engine.commands import (
    DestroyTransfer,
    FinishUpdate,
    InitTransfer,
    Refused,
    StartUpdate,
    TensorSpec,
    UpdateWeights,
)
from tandem.server.engine.hub import Hub
from tandem.server.engine.transfer import chunks

TRAINER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from safetensors.torch import load_file

port, group, file, packed = sys.argv[1:]
tensors = list(load_file(file).values())
method = f"tcp://127.0.0.1:{port}"
if group:  # as trainers make a group beside their own
    store, rank, size = next(dist.rendezvous(method, 0, 2, timeout=timedelta(seconds=20)))
    store = dist.PrefixStore(group, store)
    made, _ = c10d._new_process_group_helper(2, 0, [], "gloo", store, group, timeout=timedelta(seconds=20))
    c10d._world.pg_group_ranks[made] = {0: 0, 1: 1}
else:
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=2, timeout=timedelta(seconds=20))
    made = None
print("joined", flush=True)
for line in sys.stdin:
    if int(packed):
        rows, size = [], 0
        for tensor in tensors:
            rows.append(tensor.reshape(-1).view(torch.uint8))
            size += rows[-1].numel()
            if size > int(packed):
                dist.broadcast(torch.cat(rows), 0, group=made)
                rows, size = [], 0
        if rows:
            dist.broadcast(torch.cat(rows), 0, group=made)
    else:
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=made)
    print("sent", flush=True)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("policy", "other")):
        write_checkpoint(directory / name, "llama-gqa", seed=seed, tokenizer=False)
    return directory


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Trainer:
    def __init__(self, port: int, group: str, file: Path, packed: int) -> None:
        command = [sys.executable, "-c", TRAINER, str(port), group, str(file), str(packed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def specs(path: Path) -> tuple[TensorSpec, ...]:
    tensors = load_file(path / "model.safetensors")
    return tuple(TensorSpec(name, str(one.dtype), tuple(one.shape)) for name, one in tensors.items())


def served_while(hub: Hub, command: UpdateWeights | InitTransfer) -> object:
    """The command's reply; the loop is never kept waiting."""
    task, longest = hub.order(command), 0.0
    while not task.done:
        began = time.monotonic()
        hub.turn()
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.002)
    assert longest < 1.0
    return task.result()


@pytest.mark.parametrize(("group", "packed"), [("", 0), ("", 40_000), ("slime-pp_0", 1 << 30)])
def test_a_trainer_broadcasts_its_weights(checkpoints: Path, port: int, group: str, packed: int) -> None:
    hub = make_hub(checkpoints / "policy")
    asked = generate(1, "policy", prompt(20), max_tokens=20, ignore_eos=True)
    expected = answer(make_hub(checkpoints / "other"), replace(asked, model="other"))[0].token_ids
    with Trainer(port, group, checkpoints / "other" / "model.safetensors", packed) as trainer:
        served_while(hub, InitTransfer("127.0.0.1", port, 1, 2, group=group, seconds=20.0))
        update = UpdateWeights("policy", "distributed", tensors=specs(checkpoints / "other"), group=group)
        update = replace(update, packed=bool(packed), chunk_bytes=packed or 1)
        trainer.send()
        served_while(hub, update)
        assert answer(hub, asked)[0].token_ids == expected and hub.catalog.models[0].weight_version == 1
        wrong = replace(update, tensors=tuple(replace(spec, name=f"x.{spec.name}") for spec in update.tensors))
        trainer.send()  # what is wrong is received to its end, so that the trainer does not hang
        with pytest.raises(Refused, match="not part of this architecture: x"):
            served_while(hub, wrong)
        trainer.send()
        hub.execute(StartUpdate("policy"))
        served_while(hub, update)
        assert hub.execute(FinishUpdate("policy")).version == 2
        assert hub.standing.changes[0].came == "broadcast" and not hub.standing.changes[0].files
    assert hub.execute(DestroyTransfer(group)).group == group
    with pytest.raises(Refused, match="no transfer group"):
        hub.execute(update)


def test_what_does_not_come_is_said_in_time(checkpoints: Path, port: int) -> None:
    hub = make_hub(checkpoints / "policy")
    for wrong in (InitTransfer("127.0.0.1", port, 2, 2), InitTransfer("127.0.0.1", port, 0, 2)):
        with pytest.raises(Refused, match="rank_offset is"):
            hub.execute(wrong)
    with pytest.raises(Refused, match="backend is nccl, but the models lie on cpu"):
        hub.execute(InitTransfer("127.0.0.1", port, 1, 2, "nccl"))
    with pytest.raises(Refused, match=f"no group of 2 came together at 127.0.0.1:{port}") as refused:
        served_while(hub, InitTransfer("127.0.0.1", port, 1, 2, seconds=0.5))
    assert refused.value.error.kind == "deadline"
    with Trainer(port, "", checkpoints / "other" / "model.safetensors", 0) as trainer:
        served_while(hub, InitTransfer("127.0.0.1", port, 1, 2, seconds=20.0))
        update = UpdateWeights("policy", "distributed", tensors=specs(checkpoints / "other"))
        for tensor, message in ((TensorSpec("w", "uint99", ()), "uint99"), (TensorSpec("w", "int8", (-1,)), "shape")):
            with pytest.raises(Refused, match=message):
                hub.execute(replace(update, tensors=(tensor,)))
        trainer.process.kill()
        with pytest.raises(Refused, match=r"broadcast of .* bytes did not come"):
            served_while(hub, update)
        with pytest.raises(Refused, match="no transfer group"):
            served_while(hub, update)
    assert hub.catalog.models[0].weight_version == 0


def test_chunks_are_closed_once_they_are_larger_than_the_limit() -> None:
    tensors = [TensorSpec(str(size), "uint8", (size,)) for size in (4, 4, 4, 30, 1, 0, 9)]
    assert [[spec.shape[0] for spec in chunk] for chunk in chunks(tensors, 8)] == [[4, 4, 4], [30], [1, 0, 9]]
    assert [len(chunk) for chunk in chunks(tensors, 0)] == [1] * 7 and list(chunks([], 8)) == []
