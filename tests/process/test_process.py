"""The engine's loop with a real `Hub` on a tiny model, run in a thread; workers are `EngineClient`s."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hubs import generate, make_hub, prompt

from tandem.server.engine import process
from tandem.server.engine.commands import Pause, Refused, Resume, UpdateWeights
from tandem.server.engine.control import ModelState, Standing, StartEngine, Stop
from tandem.server.engine.hub import Hub
from tandem.server.engine.link import EngineClient, Stream
from tandem.server.engine.link_server import EngineServer
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import Group, Output, Request
from tandem.server.engine.standing import WeightsLost


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "m", "llama", max_position_embeddings=4096)


@pytest.fixture
def hub(checkpoint: Path) -> Hub:
    return make_hub(checkpoint)


@pytest.fixture
def directory(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """The run directory of an engine that serves."""
    ours, theirs = Pipe()
    server = EngineServer(tmp_path, epoch=1, wake=theirs.fileno())
    loop = threading.Thread(target=process.serve, args=(hub, server, theirs))
    loop.start()
    yield tmp_path
    ours.send(Stop())
    loop.join(10)
    assert not loop.is_alive()
    server.close()
    ours.close()
    theirs.close()


@asynccontextmanager
async def worker(directory: Path, number: int) -> AsyncIterator[EngineClient]:
    client = EngineClient(directory, number)
    client.engine_started(1)
    async with asyncio.timeout(10):
        await client.wait_ready()
    yield client
    client.close()


def ask(client: EngineClient, length: int = 20, **sampling: object) -> Stream:
    return client.submit(generate(client.next_id(), "m", prompt(length), **sampling))


async def read(stream: Stream) -> list[Output]:
    async with asyncio.timeout(30):
        return [output async for outputs in stream for output in outputs]


async def until(look: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not look():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_a_request_is_answered(directory: Path, hub: Hub, checkpoint: Path) -> None:
    async with worker(directory, 1) as client:
        assert client.catalog is not None and client.catalog == hub.catalog
        tokens = [
            token for output in await read(ask(client, max_tokens=8, ignore_eos=True)) for token in output.token_ids
        ]
    ((_, outputs),) = make_hub(checkpoint).run([generate(1, "m", prompt(20), max_tokens=8, ignore_eos=True)]).items()
    assert tokens == [token for output in outputs for token in output.token_ids] and len(tokens) == 8


async def test_pages_of_a_dead_worker_are_freed(directory: Path, hub: Hub) -> None:
    async with worker(directory, 1) as living:
        async with worker(directory, 2) as dying:
            for _ in range(20):  # some of them wait
                ask(dying, max_tokens=4000, ignore_eos=True)
            kept = ask(living, max_tokens=50, ignore_eos=True)
            await until(lambda: hub.engines[0].stats.running == 16)
        await until(lambda: hub.engines[0].stats.running + hub.engines[0].stats.waiting <= 1)
        assert (await read(kept))[-1].finish == "length"
        await until(lambda: hub.engines[0].stats.pages_used == 0)


async def test_an_idle_engine_answers_at_once_and_beats(directory: Path) -> None:
    async with worker(directory, 1) as client:
        await asyncio.sleep(0.7)
        assert client.heartbeat_age() < 0.6
        began = time.monotonic()
        await read(ask(client, max_tokens=1))
        assert time.monotonic() - began < 0.4  # not at the next beat


async def test_a_deadline_is_kept(directory: Path) -> None:
    async with worker(directory, 1) as client:
        request = generate(client.next_id(), "m", prompt(20), max_tokens=4000, ignore_eos=True)
        late = Request(request.id, "m", request.token_ids, request.sampling, deadline=time.monotonic() + 0.2)
        last = (await read(client.submit(late)))[-1]
        assert last.error is not None and last.error.kind == "deadline"


async def test_a_request_that_breaks_the_engine_breaks_alone(
    directory: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(request: Request) -> list[Output]:
        raise RuntimeError("a bug")

    async with worker(directory, 1) as client:
        running = ask(client, max_tokens=200, ignore_eos=True)
        await until(lambda: hub.engines[0].stats.running)
        with monkeypatch.context() as patch:
            patch.setattr(hub, "submit", submit)
            (broken,) = await read(ask(client))
        assert broken.error is not None and broken.error.kind == "internal" and "RuntimeError" in broken.error.message
        assert sum(len(output.token_ids) for output in await read(running)) == 200


async def test_a_group_whose_id_is_taken_breaks_alone(directory: Path, hub: Hub) -> None:
    async with worker(directory, 1) as client:
        running = ask(client, max_tokens=200, ignore_eos=True)
        group = Group(client.next_id(), "m", prompt(20), longest=8)
        client.open_group(group)
        client.open_group(replace(group, token_ids=prompt(30)))
        want = frozenset({"prompt_logprobs"})
        member = Request(client.next_id(), "m", [5, 6], want=want, prompt_logprobs=0, group=group.id)
        (refused,) = await read(client.submit(member))
        assert refused.error is not None and "no open group" in refused.error.message
        assert sum(len(output.token_ids) for output in await read(running)) == 200
        assert not hub.engines[0].stats.running


async def test_commands_reach_the_hub_and_the_catalog_the_workers(directory: Path, hub: Hub) -> None:
    async with worker(directory, 1) as client, worker(directory, 2) as other:
        running = ask(client, max_tokens=4000, ignore_eos=True)
        await until(lambda: hub.engines[0].stats.running)
        async with asyncio.timeout(10):
            paused = await client.command(Pause(mode="abort"))
        assert paused.aborted == 1 and (await read(running))[-1].finish == "abort"
        for each in (client, other):
            assert each.catalog is not None and each.catalog.models[0].paused
        (refused,) = await read(ask(other))
        assert refused.error is not None and refused.error.kind == "unavailable"
        began = time.monotonic()
        async with asyncio.timeout(10):
            await other.command(Resume())
        assert time.monotonic() - began < 0.4  # not at the next beat
        assert (await read(ask(client, max_tokens=3)))[-1].finish == "length"
        with pytest.raises(Refused, match="no model 'x'"):
            await client.command(Pause("x"))


def order(path: Path, standing: Standing | None) -> StartEngine:
    options = EngineOptions(kv_cache_memory_bytes=8 << 20)
    return StartEngine(str(path), 2, (ModelSpec("m", str(path)),), options, "info", standing)


def test_a_restart_serves_what_was_served_or_nothing(checkpoint: Path, tmp_path: Path) -> None:
    first = process.load(order(checkpoint, None))
    (model,) = process.hosted(first)
    again = process.load(order(checkpoint, first.standing))
    assert again.catalog.epoch == 2 and process.hosted(again)[0].digest == model.digest
    with pytest.raises(WeightsLost, match="model m"):
        process.load(order(checkpoint, Standing((ModelState("m", "another"),))))
    with pytest.raises(WeightsLost, match="weights lost"):
        process.load(order(tmp_path / "gone", first.standing))
    moved = ModelState("m", model.digest, 5, "v5", 0.5, 2.0, paused=True)
    card = process.load(order(checkpoint, Standing((moved,)))).catalog.models[0]
    assert (card.weight_version, card.weight_label, card.paused) == (5, "v5", True)
    assert (card.reward_mean, card.reward_std) == (0.5, 2.0)


async def test_new_weights_are_told_to_the_supervisor_before_anybody_hears_of_them(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    ours, theirs = Pipe()
    server = EngineServer(tmp_path, epoch=1, wake=theirs.fileno())
    loop = threading.Thread(target=process.serve, args=(hub, server, theirs))
    loop.start()
    async with worker(tmp_path, 1) as client:
        assert ours.recv().changes == ()
        running = ask(client, max_tokens=200, ignore_eos=True)
        async with asyncio.timeout(20):
            updated = await client.command(UpdateWeights("m", "disk", str(checkpoint), label="again"))
        assert client.catalog is not None and client.catalog.models[0].weight_label == "again"
        standing = ours.recv()
        assert standing.models[0].version == updated.version == 1 and standing.changes[0].files[0][0] == str(checkpoint)
        assert (await read(running))[-1].weight_version == 1
    ours.send(Stop())
    loop.join(10)
    server.close()
    for end in (ours, theirs):
        end.close()


def test_why_a_start_failed_names_the_flag() -> None:
    assert process.explain(OptionsError("max_num_seqs is 0: at least 1")).cause == "--max-num-seqs is 0: at least 1"
    assert process.explain(WeightsLost("weights lost: x")).lost
    assert process.explain(RuntimeError("x")).cause == "RuntimeError: x"
