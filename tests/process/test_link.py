"""The link alone: client and server on one asyncio loop, no engine behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path

import pytest
import zmq

from tandem.server.engine import link, link_server, messages
from tandem.server.engine.commands import (
    AbortAll,
    Adapters,
    AnyCommand,
    InitTransfer,
    IpcTensor,
    LoadAdapter,
    Normalize,
    Normalized,
    Pause,
    Paused,
    Refused,
    Resume,
    Resumed,
    TensorSpec,
    TransferReady,
    Updated,
    UpdateWeights,
)
from tandem.server.engine.counts import Counts, ModelStats
from tandem.server.engine.link import Abort, Ask, EngineClient, EngineUnavailable, Stream
from tandem.server.engine.link_server import EngineServer
from tandem.server.engine.messages import Order
from tandem.server.engine.request import (
    Catalog,
    EngineError,
    Group,
    Logprobs,
    ModelCard,
    Output,
    Outputs,
    Request,
    Sampling,
    Tokens,
)
from tandem.server.engine.stream import merge

CARD = ModelCard("m", "policy", "/m", "LlamaForCausalLM", "float32", 128, 320, (2,), 0, 3, 17, ("alias",), 100)
CATALOG = Catalog(1, 1, (CARD,))


def request(client: EngineClient, n: int = 1) -> Request:
    return Request(client.next_id(), "m", [5, 6, 7], Sampling(max_tokens=9, seed=2**64 - 1), n=n)


async def until(look: Callable[[], object], *servers: EngineServer) -> list[Request | Abort]:
    """Turn the engines' loops until it is true; what came in meanwhile."""
    arrived: list[Request | Abort] = []
    end = time.monotonic() + 10
    while not look():
        assert time.monotonic() < end
        for server in servers:
            arrived += server.receive()
            server.beat()
        await asyncio.sleep(0.001)
    return arrived


async def received(server: EngineServer) -> Request | Abort:
    arrived: list[Request | Abort] = []

    def look() -> bool:
        arrived.extend(server.receive())
        return bool(arrived)

    await until(look)
    (message,) = arrived
    return message


async def read(stream: Stream) -> list[Output]:
    async with asyncio.timeout(10):
        return [output async for outputs in stream for output in outputs]


@pytest.fixture
def server(tmp_path: Path):
    server = EngineServer(tmp_path, epoch=1)
    server.publish(CATALOG)
    yield server
    server.close()


@pytest.fixture
async def client(tmp_path: Path, server: EngineServer) -> AsyncIterator[EngineClient]:
    client = EngineClient(tmp_path, number=3)
    assert client.state == "starting"
    client.engine_started(1)
    await until(lambda: client.state == "ready", server)
    yield client
    client.close()


def full_output(request_id: int) -> Output:
    """Every field differs from its default."""
    tops = Logprobs([-0.5, float("-inf")], [1, 7], [[3, 4], []], [[-0.5, -1.25], []])
    error = EngineError("overloaded", "too much", "prompt", 1.5)
    scores, embedding, values = [0.25, -1.0], [0.5, -0.125], [1.5]
    first = Output(request_id, 0, [8, 9], tops, "error", 9, 16, Logprobs([-2.0]), scores, 12, error, embedding, values)
    first.pooled_index, first.earlier_versions = 7, [(11, 1)]
    return first


async def test_every_field_of_an_output_arrives(client: EngineClient, server: EngineServer) -> None:
    asked = request(client)
    stream = client.submit(asked)
    assert await received(server) == asked
    sent = full_output(asked.id)
    plain = Output(0)
    assert all(
        getattr(sent, field.name) != getattr(plain, field.name) for field in fields(Output) if field.name != "choice"
    )
    server.send(Outputs([full_output(asked.id)]))
    assert await read(stream) == [sent]


async def test_every_field_of_a_request_arrives(client: EngineClient, server: EngineServer) -> None:
    sampling = Sampling(
        max_tokens=5,
        seed=2**64 - 1,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        min_tokens=2,
        stop_ids=(3, 4),
        ignore_eos=True,
        logit_bias=((1, 2.5), (7, -100.0)),
        allowed_ids=(1, 2, 3),
        bad_words=((1, 2), (9,)),
        grammar='start: "é"',
        logprobs=3,
        logprobs_mode="processed",
        policy_logprobs=True,
    )
    asked = Request(
        client.next_id(),
        "m",
        list(range(500)),
        sampling,
        frozenset({"tokens", "logprobs"}),
        n=4,
        prompt_logprobs=2,
        first_needed_row=11,
        priority=-3,
        deadline=12.5,
        cache_salt="salt",
        adapter="adapter",
        temperature=0.5,
        group=7,
    )
    plain, drawn = Request(0, "", []), Sampling(0, 0)
    assert all(getattr(asked, field.name) != getattr(plain, field.name) for field in fields(Request))
    assert all(getattr(sampling, field.name) != getattr(drawn, field.name) for field in fields(Sampling))
    client.submit(asked)
    assert await received(server) == asked


async def test_the_catalog_arrives_and_changes(client: EngineClient, server: EngineServer) -> None:
    assert client.catalog == CATALOG
    changed = Catalog(1, 2, ())
    server.publish(changed)
    await until(lambda: client.catalog == changed)


async def test_worker_before_engine(tmp_path: Path) -> None:
    client = EngineClient(tmp_path)
    client.engine_started(4)
    await asyncio.sleep(0.05)
    with pytest.raises(EngineUnavailable, match="starting"):
        client.submit(request(client))
    server = EngineServer(tmp_path, epoch=4)
    waiting = asyncio.create_task(client.wait_ready())
    await asyncio.sleep(0.05)
    assert not waiting.done()  # no catalog yet
    server.publish(CATALOG)
    await until(waiting.done, server)
    client.close()
    server.close()


async def test_ids_tell_workers_apart(tmp_path: Path) -> None:
    first, second = EngineClient(tmp_path, 1), EngineClient(tmp_path, 2)
    ids = [client.next_id() for client in (first, second) for _ in range(1000)]
    assert len(set(ids)) == 2000
    first.close()
    second.close()


async def test_each_worker_gets_its_own(tmp_path: Path, server: EngineServer, client: EngineClient) -> None:
    other = EngineClient(tmp_path, number=4)
    other.engine_started(1)
    await until(lambda: other.state == "ready", server)
    streams = [each.submit(request(each)) for each in (client, other)]
    await until(lambda: not server.receive() and sum(map(len, server._open.values())) == 2)
    server.send(
        Outputs([Output(stream.request_id, token_ids=[i], finish="length") for i, stream in enumerate(streams)])
    )
    assert [(await read(stream))[0].token_ids for stream in streams] == [[0], [1]]
    assert not any(server._open.values())
    other.close()


def tokens(*entries: tuple[int, int, int], version: int = 5) -> Outputs:
    """(request id, choice, token) each, by column."""
    outputs = Outputs()
    outputs.tokens.append(Tokens(*map(list, zip(*entries, strict=True)), version))
    return outputs


async def test_tokens_by_column_arrive_as_outputs(tmp_path: Path, client: EngineClient, server: EngineServer) -> None:
    other = EngineClient(tmp_path, number=4)
    other.engine_started(1)
    await until(lambda: other.state == "ready", server)
    one, two = client.submit(request(client, n=2)), other.submit(request(other))
    await until(lambda: not server.receive() and sum(map(len, server._open.values())) == 2)
    server.send(tokens((one.request_id, 1, 7), (two.request_id, 0, 8), (one.request_id, 0, 9)))
    server.send(tokens((two.request_id, 0, 10), (one.request_id, 5, 11), version=6))
    server.send(tokens((12345, 0, 1)))  # nobody's
    ends = [(one.request_id, 0), (one.request_id, 1), (two.request_id, 0)]
    server.send(Outputs([Output(number, choice, finish="length") for number, choice in ends]))
    got = [(output.choice, token) for output in await read(one) for token in output.token_ids]
    assert sorted(got) == [(0, 9), (1, 7)]
    assert [token for output in await read(two) for token in output.token_ids] == [8, 10]
    other.close()


def test_a_token_waits_with_what_came_before_it() -> None:
    stream = Stream(Request(7, "m", [5], Sampling(max_tokens=9, seed=1), n=2), lambda _: None)
    stream.push_token(1, 3, 5)
    assert stream.take() == [Output(7, 1, [3], weight_version=5)] and stream.take() == []
    stream.push_token(1, 4, 5)
    stream.push_token(1, 6, 6)
    stream.push_token(2, 8, 6)  # no choice of it
    assert stream.take() == [Output(7, 1, [4, 6], weight_version=6, earlier_versions=[(5, 1)])]
    stream.drop(1)
    stream.push_token(1, 4, 6)
    assert stream.take() == [] and not stream.ended


def test_outputs_that_are_merged_tell_which_version_drew_which_token() -> None:
    """Whatever is merged first, and with what."""
    drawn = [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]  # token, version
    finish = Output(7, finish="abort", weight_version=4)

    def output(*tokens: tuple[int, int]) -> Output:
        one = Output(7, token_ids=[tokens[0][0]], weight_version=tokens[0][1])
        for token, version in tokens[1:]:
            merge(one, Output(7, token_ids=[token], weight_version=version))
        return one

    for cut in range(1, 6):
        whole, second = output(*drawn[:cut]), output(*drawn[cut:])
        merge(whole, second)
        merge(whole, finish)
        assert whole.token_ids == [1, 2, 3, 4, 5, 6] and whole.finish == "abort"
        assert [run for run in whole.runs() if run[1]] == [(1, 2), (2, 3), (3, 1)] and whole.weight_version == 4
        assert second.token_ids == [token for token, _ in drawn[cut:]]


async def test_nothing_crosses_a_restart(tmp_path: Path, client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client))
    await received(server)
    client.engine_lost("killed by SIGKILL")
    (last,) = await read(stream)
    assert last.error == EngineError("unavailable", "killed by SIGKILL") and last.finish == "error"
    assert (client.state, client.cause) == ("down", "killed by SIGKILL")
    assert client.heartbeat_age() == float("inf")
    with pytest.raises(EngineUnavailable, match="SIGKILL"):
        client.submit(request(client))

    client.engine_started(2)
    assert client.state == "starting"
    again = EngineServer(tmp_path, epoch=2)
    again.publish(Catalog(2, 1, ()))
    server.send(Outputs([Output(stream.request_id, token_ids=[1])]))  # the dead engine speaks
    await until(lambda: client.state == "ready", again)
    assert client.catalog == Catalog(2, 1, ()) and client.cause is None
    stream = client.submit(request(client))
    asked = await received(again)
    assert asked == request_of(stream, asked)
    # A message of another epoch is not taken, even over the right socket.
    again._socket.send_multipart(
        (b"3", again._encode(messages.Step(1, [messages.row_of(Output(stream.request_id, finish="stop"))], [])))
    )
    again.send(Outputs([Output(stream.request_id, token_ids=[4], finish="length")]))
    assert [output.token_ids for output in await read(stream)] == [[4]]
    again.close()


def request_of(stream: Stream, message: Request | Abort) -> Request:
    assert isinstance(message, Request) and message.id == stream.request_id
    return message


async def test_a_slow_reader_gets_few_large_outputs(client: EngineClient, server: EngineServer) -> None:
    asked = request(client, n=2)
    stream = client.submit(asked)
    await received(server)
    for token in range(300):
        ends = "length" if token == 299 else None
        marks = Logprobs([-float(token)], [1], [[token]], [[-1.0]])
        server.send(Outputs([Output(asked.id, 0, [token], marks, ends), Output(asked.id, 1, [token], finish=ends)]))
    await until(lambda: client.open_streams == 0)
    assert len(stream._pending) == 2
    first, second = await read(stream)
    assert first.token_ids == second.token_ids == list(range(300))
    assert first.logprobs is not None and first.logprobs.values == [-float(token) for token in range(300)]
    assert first.finish == second.finish == "length"


async def test_a_stalled_worker_never_blocks_the_engine(client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client))
    await received(server)
    asyncio.get_running_loop().remove_reader(client._socket.fileno())  # it reads nothing any more
    sent, padding = 0, Logprobs(top_ids=[list(range(100))])  # so that the kernel's buffers fill quickly
    while sent < 20_000 and not (server._backlog and sent > 6_000):
        server.send(Outputs([Output(stream.request_id, token_ids=[sent], logprobs=padding)]))
        sent += 1
    assert sum(map(len, server._backlog.values())) == 1  # one output for the one choice, whatever it has missed
    server.send(Outputs([Output(stream.request_id, finish="stop")]))
    await until(lambda: client._receive() or client.open_streams == 0, server)
    assert [token for output in await read(stream) for token in output.token_ids] == list(range(sent))


async def test_an_aborted_choice_is_heard_of_no_more(client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client, n=2))
    await received(server)
    client.abort(stream.request_id, 0)
    assert await received(server) == Abort(1, stream.request_id, 0)
    server.send(
        Outputs([Output(stream.request_id, 0, [1], finish="abort"), Output(stream.request_id, 1, [2], finish="stop")])
    )
    assert [(output.choice, output.token_ids) for output in await read(stream)] == [(1, [2])]
    client.abort(stream.request_id)  # it is over: nothing happens
    await asyncio.sleep(0.02)
    assert server.receive() == [] and not any(server._open.values())


async def test_closing_a_stream_ends_it_at_once(client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client, n=3))
    await received(server)
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    stream.close()
    assert await reading == [] and client.open_streams == 0
    assert await received(server) == Abort(1, stream.request_id, None)


async def test_requests_of_a_dead_worker_are_aborted(tmp_path: Path, server: EngineServer) -> None:
    """Its connection ends without a word; the next heartbeat finds out."""
    dying = EngineClient(tmp_path, number=9)
    dying.engine_started(1)
    await until(lambda: dying.state == "ready", server)
    streams = [dying.submit(request(dying)) for _ in range(2)]
    await until(lambda: len(server._open[9]) == 2, server)
    dying.close()
    arrived = await until(lambda: 9 not in server._open, server)
    arrived += server.receive()
    assert arrived == [Abort(1, stream.request_id, None) for stream in streams]
    server.send(Outputs([Output(streams[0].request_id, token_ids=[1])]))  # what a last step still said goes nowhere


async def test_draining_lets_streams_finish(client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client))
    await received(server)
    client.drain("shutting down")
    with pytest.raises(EngineUnavailable, match="shutting down"):
        client.submit(request(client))
    with pytest.raises(EngineUnavailable):
        await client.wait_ready()
    client.open_group(Group(client.next_id(), "m", [5], longest=2), goes_on=True)  # of an answer that has begun
    later = client.submit(request(client), goes_on=True)
    await until(lambda: len(server._open[later.request_id >> link.WORKER_SHIFT]) == 2, server)
    server.send(Outputs([Output(later.request_id, token_ids=[1], finish="stop")]))
    await read(later)
    idle = asyncio.create_task(client.wait_idle())
    server.send(Outputs([Output(stream.request_id, token_ids=[1], finish="stop")]))
    assert (await read(stream))[0].finish == "stop"
    await asyncio.wait_for(idle, 5)
    assert client.state == "down"  # the catalog of an engine that comes later does not make it ready again
    server.publish(CATALOG)
    await asyncio.sleep(0.05)
    assert client.state == "down"


async def test_what_outlasts_the_drain_gets_an_error(client: EngineClient, server: EngineServer) -> None:
    stream = client.submit(request(client))
    await received(server)
    server.send(Outputs([Output(stream.request_id, token_ids=[1])]))
    await until(lambda: stream._pending)
    client.fail("time is up")
    written, ended = await read(stream)
    assert written.token_ids == [1]
    assert ended.error == EngineError("unavailable", "time is up")
    assert await received(server) == Abort(1, stream.request_id, None)
    client.drain("shutting down")
    client.fail("time is up")
    with pytest.raises(EngineUnavailable, match="shutting down"):
        client.submit(request(client), goes_on=True)


async def test_nobody_waits_for_a_command_when_the_server_ends(client: EngineClient, server: EngineServer) -> None:
    waiting = asyncio.create_task(client.command(Pause()))
    await received(server)
    client.drain("shutting down")
    client.abandon()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await waiting


async def test_heartbeats_stop_with_the_loop(client: EngineClient, server: EngineServer) -> None:
    await until(lambda: client.heartbeat_age() < link.BEAT_SECONDS / 2, server)
    await asyncio.sleep(0.3)  # the engine's loop does not come around
    assert client.heartbeat_age() >= 0.3
    await until(lambda: client.heartbeat_age() < 0.1, server)


def test_merging_two_outputs_says_what_both_say() -> None:
    first = Output(
        1, 2, [5], Logprobs([-1.0], [2], [[5]], [[-1.0]]), cached_tokens=16, prompt_logprobs=Logprobs([-3.0])
    )
    second = Output(1, 2, [6], Logprobs([-2.0], [1], [[6]], [[-2.0]]), "stop", 6, weight_version=4)
    merge(first, second)
    assert first == Output(
        1,
        2,
        [5, 6],
        Logprobs([-1.0, -2.0], [2, 1], [[5], [6]], [[-1.0], [-2.0]]),
        "stop",
        6,
        cached_tokens=16,
        prompt_logprobs=Logprobs([-3.0]),
        weight_version=4,
        earlier_versions=[(0, 1)],
    )


def test_the_socket_is_a_file_in_the_run_directory(tmp_path: Path, server: EngineServer) -> None:
    assert (tmp_path / "engine-1").is_socket()
    assert server._socket.getsockopt(zmq.TYPE) == zmq.ROUTER


async def test_an_engine_says_how_its_models_do(tmp_path: Path, server: EngineServer) -> None:
    client = EngineClient(tmp_path, 3)
    client.engine_started(1)
    await until(lambda: client.state == "ready", server)
    told = [ModelStats("m", "policy", 4, 1, 2, False, 16, 64, 8, 3, 56, 2, Counts(started=5, finished={"stop": 2}))]
    told[0].counts.score.observe(-0.5)
    both = asyncio.gather(client.stats(5), client.stats(5))  # one question, whoever else wants to know
    asked: list[Ask] = []
    while not both.done():
        for ask in [message for message in server.receive(0.001) if isinstance(message, Ask)]:
            asked.append(ask)
            server.tell(ask.worker, told)
        await asyncio.sleep(0.001)
    assert await both == [told, told] and [ask.worker for ask in asked] == [3]
    assert await client.stats(0.05) is None  # it does not answer now
    waiting = asyncio.create_task(client.stats(60))
    await asyncio.sleep(0.01)
    client.engine_lost("gone")
    assert await waiting is None and await client.stats(60) is None
    client.close()


async def obey(server: EngineServer, outcome: object, *, publish: Catalog | None = None) -> Order:
    """Takes the next command and answers it."""
    orders: list[Order] = []

    def look() -> bool:
        orders.extend(message for message in server.receive() if isinstance(message, Order))
        return bool(orders)

    await until(look)
    (order,) = orders
    if publish is not None:
        server.publish(publish)
    server.answer(order, outcome)
    return order


async def test_a_command_is_answered_once_every_worker_knows(
    tmp_path: Path, client: EngineClient, server: EngineServer
) -> None:
    other = EngineClient(tmp_path, number=4)
    other.engine_started(1)
    await until(lambda: other.state == "ready", server)
    asyncio.get_running_loop().remove_reader(other._socket.fileno())  # it reads nothing for now
    waiting = asyncio.create_task(client.command(Pause("m", "abort", clear_cache=True)))
    order = await obey(server, Paused(("m",), 3, 0), publish=Catalog(1, 2, ()))
    assert order.command == Pause("m", "abort", clear_cache=True)
    for _ in range(5):
        server.receive()
        server.beat()
        await asyncio.sleep(0.005)
    assert client.catalog == Catalog(1, 2, ()) and not waiting.done()
    other._receive()
    await until(waiting.done, server)
    assert await waiting == Paused(("m",), 3, 0) and other.catalog == Catalog(1, 2, ())
    other.close()


async def test_nobody_waits_for_workers_that_are_gone_or_stuck(
    tmp_path: Path, client: EngineClient, server: EngineServer
) -> None:
    now = [0.0]
    server._clock = lambda: now[0]
    dead, stuck = (EngineClient(tmp_path, number=number) for number in (4, 5))
    for other in (dead, stuck):
        other.engine_started(1)
    await until(lambda: dead.state == stuck.state == "ready", server)
    asyncio.get_running_loop().remove_reader(stuck._socket.fileno())
    dead.close()
    waiting = asyncio.create_task(client.command(Resume()))
    await obey(server, Resumed(("m",)), publish=Catalog(1, 2, ()))
    for _ in range(5):
        server.receive()
        now[0] += 0.5
        server.beat()
        await asyncio.sleep(0.002)
    assert not waiting.done() and 4 not in server._open
    now[0] += link_server.SEEN_SECONDS
    await until(waiting.done, server)
    assert await waiting == Resumed(("m",))
    stuck.close()


async def test_a_command_is_refused_or_lost(client: EngineClient, server: EngineServer) -> None:
    waiting = asyncio.create_task(client.command(AbortAll("x")))
    error = EngineError("not_found", "no model 'x'", "model")
    await obey(server, error)
    await until(waiting.done, server)
    with pytest.raises(Refused, match="no model 'x'") as refused:
        await waiting
    assert refused.value.error == error
    waiting = asyncio.create_task(client.command(AbortAll("m")))
    await asyncio.sleep(0.01)
    client.engine_lost("killed by SIGKILL")
    with pytest.raises(EngineUnavailable, match="SIGKILL"):
        await waiting
    with pytest.raises(EngineUnavailable, match="SIGKILL"):
        await client.command(AbortAll("m"))


async def test_every_command_and_reply_arrives(client: EngineClient, server: EngineServer) -> None:
    storage = (1, b"\x00handle", 512, 64, b"counter", 8, b"event", True)
    sent: list[tuple[AnyCommand, object]] = [
        (Normalize("m", 0.5, 2.0), Normalized(0.5, 2.0)),
        (LoadAdapter("m", "a", "/a", replace=True), Adapters(("a", "b"))),
        (
            UpdateWeights("m", "cuda_ipc", handles=(IpcTensor("w", "bfloat16", (2, 3), storage, 7),), also=("v",)),
            Updated(("m", "v"), True, 3, "step-3", 2, 1024, 0.5, 0.25, 9),
        ),
        (
            UpdateWeights("m", "distributed", tensors=(TensorSpec("w", "float32", ()),), group="g", packed=True),
            Updated(("m",), False, 3, "", 1, 4, 0.5),
        ),
        (InitTransfer("localhost", 51216, 1, 2, group="g", seconds=5.0), TransferReady(1, 2)),
    ]
    for command, reply in sent:
        waiting = asyncio.create_task(client.command(command))
        assert (await obey(server, reply)).command == command
        await until(waiting.done, server)
        assert await waiting == reply
