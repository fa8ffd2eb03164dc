"""A real server whose weights were replaced: what becomes of them when the engine is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import write_checkpoint
from servers import Server, eventually

from tandem.server.engine.commands import Command, UpdateWeights
from tandem.server.engine.link import EngineClient

ASKED = {"model": "m", "prompt": "One, two,", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@asynccontextmanager
async def another_worker(run_directory: Path, epoch: int, number: int) -> AsyncIterator[EngineClient]:
    client = EngineClient(run_directory, number)
    client.engine_started(epoch)
    async with asyncio.timeout(10):
        await client.wait_ready()
    yield client
    client.close()


def said(server: Server) -> Any:
    answer = httpx.post(f"{server.base_url}/v1/completions", json=ASKED, timeout=30).json()
    return answer["choices"][0]["text"], answer["weight_version"]


async def test_a_killed_engine_comes_back_with_the_weights_of_its_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (write_checkpoint(tmp_path / name, "llama", seed=seed) for seed, name in enumerate(("old", "new")))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the run directory is made there
    with Server(tmp_path, f"m={old}") as server:
        (run_directory,) = tmp_path.glob("tandem-*")

        async def order(epoch: int, command: Command[Any]) -> Any:
            async with another_worker(run_directory, epoch, 40 + epoch) as client:
                return await asyncio.wait_for(client.command(command), 30)

        async def kill_engine() -> None:
            (engine,) = server.children("tandem-engine")
            os.kill(engine, signal.SIGKILL)
            await asyncio.to_thread(eventually, lambda: server.ready()[0] == 503, 30)

        text, version = said(server)
        assert version == 0
        assert (await order(1, UpdateWeights("m", "disk", str(new), label="step-1"))).version == 1
        changed = said(server)
        assert changed[0] != text and changed[1] == 1
        await kill_engine()
        await asyncio.to_thread(server.wait_ready)
        assert said(server) == changed
        (model,) = httpx.get(f"{server.base_url}/v1/models").json()["data"]
        assert (model["weight_version"], model["weight_label"]) == (1, "step-1")

        whole = (old / "model.safetensors").read_bytes()
        memory = SharedMemory(create=True, size=len(whole))
        try:
            memory.buf[:] = whole
            assert (await order(2, UpdateWeights("m", "shm", memory.name))).version == 2
        finally:
            memory.close()
            memory.unlink()
        assert said(server) == (text, 2)
        await kill_engine()
        await asyncio.to_thread(eventually, lambda: "weights lost" in server.ready()[1], 30)
        assert "weights lost: version 2 came by shared memory" in server.ready()[1]
