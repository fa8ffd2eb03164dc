"""The benchmarks of the serving stack itself, small: they count right, and they notice what is not as it should be."""

from __future__ import annotations

import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.benchmarks.bench import frontend, raw, scaling, soak
from tandem.benchmarks.bench.served import Served, bare, tandem
from tandem.server.engine.link_server import EngineServer

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with tandem("paced=null:5", "free=null", "null=null", "--max-num-seqs", 16) as server:
        yield server


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWER = HEAD + chunk(b"data: a\n\n") + chunk(b"data: b\n\ndata: c\n\n") + chunk(raw.DONE + b"\n\n") + raw.LAST


@pytest.mark.parametrize("size", [*range(1, 24), 1000])
def test_events_are_counted_once_wherever_they_are_cut(size: int) -> None:
    ours, theirs = socket.socketpair()
    reader = raw.Reader(ours)
    with ours, theirs:
        ended: list[bool] = []
        for part in [ANSWER[:12], *(ANSWER[at : at + size] for at in range(12, len(ANSWER), size))]:
            theirs.sendall(part)
            ended.append(raw._take(reader))
    assert ended == [False] * (len(ended) - 1) + [True]
    assert (reader.events, reader.size) == (4, len(ANSWER))
    assert b"".join(raw._chunks(ANSWER.partition(b"\r\n\r\n")[2])).count(b"data: ") == 4


@pytest.mark.parametrize("answer", [b"HTTP/1.1 429 Too Many Requests\r\n\r\n", HEAD + chunk(b"data: a\n\n") + raw.LAST])
def test_an_answer_that_is_none_is_said(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        with pytest.raises(raw.Broken):
            raw._take(raw.Reader(ours))


def test_events_beside_a_bare_application(server: Served) -> None:
    options = Namespace(tokens=60, pace=5.0, rounds=1, streams=[8])
    with bare() as other:
        size = frontend.record(server, other, options.tokens)
        found = frontend.measure_events(server, other, options, 8)
    costs = found["cpu_us_per_event"]
    assert set(costs) == {"tandem", "sse-starlette", "StreamingResponse"}
    assert all(1 < cost["median"] < 10_000 for cost in costs.values())
    quotient = costs["tandem"]["median"] / costs["sse-starlette"]["median"]
    assert found["ratio_to_sse_starlette"]["median"] == pytest.approx(quotient, rel=0.01)
    assert found["tokens_per_event"] == pytest.approx(60 / 63, rel=0.05)  # role, finish and [DONE] have none
    assert 60 * 100 < size < 60 * 400


def test_tokens_and_requests(server: Served) -> None:
    found = frontend.measure_whole(server, frontend.chat_body("free", 300), 300, 8, rounds=1)
    assert found["tokens_per_second"]["median"] > 1000 and found["tokens_per_event"]["median"] > 0.9
    assert found["cpu_us_per_token"][frontend.WORKER]["median"] > 0
    shown = frontend.table({"events": [], "tokens": [found], "requests": found})
    assert "| 8 |" in shown and "µs of the API worker" in shown


def test_streams_that_never_ran_together_are_no_measurement(server: Served) -> None:
    side = frontend.Measured(server, frontend.CHAT, frontend.chat_body("free", 5), 5)
    with pytest.raises(raw.Broken, match="hardly ran"):
        side.window(2)


@pytest.mark.parametrize(("waiting", "answer", "ahead"), [(0, None, False), (0, None, True), (7, 5, False)])
def test_the_engines_loop(waiting: int, answer: int | None, ahead: bool, tmp_path: Path) -> None:
    server = EngineServer(tmp_path, epoch=1)
    try:
        loop = scaling.Loop(4, waiting, answer, ahead, server)
        assert 0 < scaling.per_step(loop, 20, 3).median < 0.1
        parts = scaling.parts_of(loop, 20)
        assert set(parts) == {"plan", "launch", "advance", "resolve", "send", "else"} and min(parts.values()) >= 0
        stats = loop.hub.engines[0].stats
        assert stats.running + stats.waiting == 4 + waiting and stats.running >= 3
        assert stats.counts.generated_tokens > 4 * 40
    finally:
        server.close()


def test_a_soak(server: Served) -> None:
    assert soak.run(server.url, 0, 230, 8) > 0  # three of them leave in the middle
    held = soak.held(server)
    assert len(held) == 3 and all(10 < size < 5000 for size in held.values())
    rows: list[dict[str, Any]] = [{"requests": 0, "MiB": held}, {"requests": 230, "per_second": 9, "MiB": held}]
    growth = dict.fromkeys(held, 0.0)
    assert "| 230 | 9 |" in soak.table({"rows": rows, "growth_MiB": growth, "settled_at": 0})
