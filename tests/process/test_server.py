"""The real server as processes: what is killed comes back or ends cleanly, and nothing that was asked hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import write_checkpoint
from servers import Server, alive, child_processes, eventually

CONTEXT = 32768  # tokens that no test waits for: 8,000 take less than 4 s
DRAIN = 4  # seconds
LONG = {"model": "m", "prompt": "One, two,", "max_tokens": CONTEXT - 64, "ignore_eos": True, "stream": True}
SHORT = {"model": "m", "prompt": "One, two,", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m"), "llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Survives the tests that use it; the last of them stops it."""
    with Server(
        tmp_path_factory.mktemp("log"), f"m={checkpoint}", "--max-num-seqs", 8, "--drain-seconds", DRAIN
    ) as server:
        yield server


async def events(server: Server, body: dict[str, Any] = LONG) -> AsyncIterator[Any]:
    """The decoded `data:` lines of a stream; a string for one that is no JSON."""
    async with (
        httpx.AsyncClient(base_url=server.base_url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield json.loads(data) if data.startswith("{") else data


class Reader:
    """A stream that is read in the background."""

    def __init__(self, server: Server, body: dict[str, Any] = LONG) -> None:
        self.seen: list[Any] = []
        self._task = asyncio.create_task(self._read(server, body))

    async def _read(self, server: Server, body: dict[str, Any]) -> None:
        async for event in events(server, body):
            self.seen.append(event)

    async def begun(self) -> None:
        async with asyncio.timeout(30):
            while len(self.seen) < 3:
                assert not self._task.done(), self.seen
                await asyncio.sleep(0.01)

    async def ended(self, seconds: float = 30) -> list[Any]:
        async with asyncio.timeout(seconds):
            await self._task
        return self.seen


def complete(server: Server, body: dict[str, Any] = SHORT) -> httpx.Response:
    return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)


def run_directory(server: Server) -> Path:
    """Found by the socket that the engine listens on."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    inodes = {os.readlink(link) for pid in server.children("tandem-engine") for link in descriptors(pid)}
    (path,) = {
        fields[7]
        for fields in (line.split() for line in lines)
        if len(fields) == 8 and f"socket:[{fields[6]}]" in inodes and "/engine-" in fields[7]
    }
    return Path(path).parent


def descriptors(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def test_it_says_what_it_serves(server: Server) -> None:
    assert "LlamaForCausalLM" in server.log and "float32" in server.log and f"{CONTEXT:,}" in server.log
    assert "KV caches take" in server.log  # how the memory was divided
    assert server.ready()[0] == 200
    assert complete(server).json()["usage"]["completion_tokens"] == 4


def test_the_run_directory_is_private(server: Server) -> None:
    assert stat.S_IMODE(run_directory(server).stat().st_mode) == 0o700


def test_children_are_not_reached_by_the_terminals_signals(server: Server) -> None:
    for pid in server.children():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert os.getpgid(pid) != os.getpgid(server.process.pid)
    assert complete(server).status_code == 200


async def test_a_killed_worker_is_replaced(server: Server) -> None:
    readers = [Reader(server) for _ in range(8)]  # as many as may run at once
    for reader in readers:
        await reader.begun()
    (worker,) = server.children("tandem-api")
    os.kill(worker, signal.SIGKILL)
    for reader in readers:
        with pytest.raises(httpx.HTTPError):
            await reader.ended()
    answer = await asyncio.to_thread(complete, server)  # waits in the listening socket until a new worker takes it
    assert answer.status_code == 200  # which has a place to run in: the lost requests have left
    assert worker not in server.children("tandem-api")
    assert "killed by SIGKILL; another is started" in server.log


async def test_a_killed_engine_ends_its_streams_and_comes_back(server: Server) -> None:
    readers = [Reader(server) for _ in range(12)]  # four of them wait for a place
    async with asyncio.timeout(30):
        while sum(len(reader.seen) > 3 for reader in readers) < 8:
            await asyncio.sleep(0.01)
    (engine,) = server.children("tandem-engine")
    os.kill(engine, signal.SIGKILL)
    for reader in readers:
        with suppress(AssertionError):  # one that came too late was refused with a 503
            *_, last, done = await reader.ended()
            assert done == "[DONE]" and "SIGKILL" in last["error"]["message"]
    assert sum("[DONE]" in reader.seen for reader in readers) >= 8
    status, text = server.ready()
    assert status == 503 and "SIGKILL" in text
    refused = complete(server)
    assert refused.status_code == 503 and "SIGKILL" in refused.json()["error"]["message"]
    server.wait_ready()
    assert complete(server).status_code == 200
    assert server.children("tandem-engine") != [engine]


async def test_sigterm_drains(server: Server) -> None:
    """The last test on this server: one stream finishes in time, one does not, new requests are refused."""
    directory, pids = run_directory(server), server.children()
    short, long = Reader(server, {**LONG, "max_tokens": 100}), Reader(server)
    await short.begun()
    await long.begun()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(eventually, lambda: "shutting down" in server.ready()[1], 2)
    assert server.ready()[0] == 503
    refused = await asyncio.to_thread(complete, server)
    assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
    *_, last, done = await short.ended()
    assert last["choices"][0]["finish_reason"] == "length" and done == "[DONE]"
    *_, last, done = await long.ended()
    assert "shutting down" in last["error"]["message"] and done == "[DONE]"
    assert await asyncio.to_thread(server.process.wait, 20) == 0
    assert DRAIN <= time.monotonic() - began < DRAIN + 10
    assert not directory.exists() and not any(map(alive, pids))


async def test_lost_weights_are_said_and_no_orphan_stays(checkpoint: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in checkpoint.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    with Server(tmp_path, f"m={own}") as server:
        write_checkpoint(own, "llama", seed=1, max_position_embeddings=CONTEXT)
        (engine,) = server.children("tandem-engine")
        os.kill(engine, signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: "weights lost" in server.ready()[1], 60)
        status, text = server.ready()
        assert status == 503 and str(own) in text
        pids = server.children()
        assert pids and server.stop(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.to_thread(eventually, lambda: not any(map(alive, pids)), 10)


async def test_killing_the_supervisor_kills_a_busy_server(checkpoint: Path, tmp_path: Path) -> None:
    with Server(tmp_path, f"m={checkpoint}", "--api-workers", 2) as server:
        reader = Reader(server)
        await reader.begun()
        pids = server.children()
        assert len(pids) == 3
        server.stop(signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: not any(map(alive, pids)), 10)
        with pytest.raises(httpx.HTTPError):
            await reader.ended()


async def test_a_second_signal_ends_at_once(checkpoint: Path, tmp_path: Path) -> None:
    with Server(tmp_path, f"m={checkpoint}") as server:
        reader = Reader(server)
        await reader.begun()
        pids = server.children()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(eventually, lambda: "draining" in server.log, 10)
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT, seconds=5) == 128 + signal.SIGINT
        assert not any(map(alive, pids))
        with pytest.raises(httpx.HTTPError):
            await reader.ended()


def test_a_signal_ends_a_start(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "tandem.server", "serve", "--port", "0", f"m={checkpoint}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually(lambda: len(child_processes(process.pid)) == 2, 20)
    pids = child_processes(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not any(map(alive, pids))


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem.server", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_busy_port_is_said_before_anything_is_loaded(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = start(f"m={checkpoint}", "--port", port)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert str(port) in last and "in use" in last and "--port" in last


def test_a_checkpoint_that_cannot_be_served_is_named_last(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ended = start(f"m={tmp_path}", "--port", 0)
    assert ended.returncode == 1
    assert "model m" in ended.stderr.splitlines()[-1] and "model.safetensors" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
