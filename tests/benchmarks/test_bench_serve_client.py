"""The load generator against a server whose every byte and delay is scripted."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Iterable
from typing import Any

import pytest
from scripted_server import CLOSE, END, STREAM, Script, ScriptedServer, Step, completion, document, part, tokens, usage

from tandem.benchmarks.bench.client import Load, Outcome, busiest_second, run
from tandem.benchmarks.bench.serve import send

LATE = 0.005  # seconds that reading may add to the fastest of several answers; a busy machine adds more to others


STEADY = [0.05 * number for number in range(12)]


def load(server: ScriptedServer, count: int = 1, **more: Any) -> Load:
    bodies = [json.dumps({"prompt": number}) for number in range(count)]
    return Load(url=f"{server.url}/v1/completions", bodies=bodies, **{"moments": [0.0] * count, **more})


def sent(script: Script, count: int = 1, **more: Any) -> Outcome:
    with ScriptedServer(script) as server:
        return asyncio.run(run(load(server, count, **more)))


def test_the_first_token_and_the_gaps_are_those_of_the_script() -> None:
    outcome = sent(lambda body, number: tokens(9, 0.08, 0.02, usage(5, 9, cached=2)), 12, moments=STEADY)
    for record in outcome.records:
        assert record.error == ""
        assert len(record.times) == 9 and record.text == "x" * 9 and record.finish_reason == "length"
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (5, 9, 2)
        assert record.times == sorted(record.times) and record.times[0] > 0.079 and record.end > 0.239
    assert min(record.times[0] for record in outcome.records) < 0.08 + LATE
    assert min(record.end for record in outcome.records) < 0.24 + LATE
    gaps = [b - a for record in outcome.records for a, b in zip(record.times, record.times[1:], strict=False)]
    assert statistics.median(gaps) == pytest.approx(0.02, abs=0.004)
    assert outcome.events == 12 * 11  # nine tokens, usage, [DONE]


def test_a_stream_in_odd_pieces_is_read_whole() -> None:
    whole = b": hello\r\n\r\n" + b"".join(completion("é☃", "stop" if i == 9 else None) for i in range(10))
    whole = whole.replace(b"\n\n", b"\r\n\r\n") + usage(1, 10) + b"data: [DONE]"

    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        yield STREAM
        for index in range(0, len(whole), 7):
            yield part(whole[index : index + 7])
            yield 0.0005
        yield END

    (record,) = sent(script).records
    assert (record.error, record.text, record.completion_tokens) == ("", "é☃" * 10, 10)
    assert len(record.times) == 10


def test_several_events_in_one_read_arrive_together() -> None:
    burst = b"".join(completion("a", "length" if i == 4 else None) for i in range(5)) + b"data: [DONE]\n\n"
    (record,) = sent(lambda body, number: [STREAM, 0.05, part(burst), END]).records
    assert len(record.times) == 5 and len(set(record.times)) == 1
    assert record.completion_tokens is None


@pytest.mark.parametrize(
    "steps, words",
    [
        ([document(404, {"detail": "Not Found"})], "HTTP 404: Not Found"),
        ([document(429, {"error": {"message": "queue full", "type": "x"}})], "HTTP 429: queue full"),
        ([document(200, {"choices": [{"text": "a"}]})], "a whole JSON document instead of a stream"),
        ([STREAM, part(completion("a")), 0.01, CLOSE], "broke in the middle of the answer"),
        ([STREAM, part(completion("a")), END], "ended early: no finish_reason and no [DONE]"),
        ([STREAM, part(completion("a")), part(b'data: {"error": {"message": "engine died"}}\n\n'), END], "engine died"),
        ([STREAM, part(b"data: nonsense\n\n"), END], "no chunk of an answer"),
        ([b"this is no HTTP\r\n\r\n"], "Bad status line"),
        ([CLOSE], "ServerDisconnectedError"),
        ([STREAM, part(completion("a")), 5.0], "no complete answer within 0.3 s"),
    ],
)
def test_what_goes_wrong_is_a_reason_and_not_a_figure(steps: list[Step], words: str) -> None:
    (record,) = sent(lambda body, number: steps, timeout=0.3).records
    assert words in record.error
    assert 0 < record.end < 1


def test_a_server_that_is_not_there_fails_every_request() -> None:
    with ScriptedServer(lambda body, number: []) as server:
        gone = load(server, 3)
    outcome = asyncio.run(run(gone))
    assert all("Cannot connect" in record.error for record in outcome.records)


def test_slow_answers_delay_no_request_of_an_open_loop() -> None:
    moments = [0.02 * number for number in range(20)]

    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        yield from tokens(2, 0.6, 0.1)

    with ScriptedServer(script) as server:
        outcome = asyncio.run(run(load(server, 20, moments=moments)))
        arrivals = [moment - server.arrivals[0] for moment in server.arrivals]
        assert server.most_open == 20  # the last one left before the first was answered
    assert [record.due - outcome.records[0].due for record in outcome.records] == pytest.approx(moments)
    late = [record.start - record.due for record in outcome.records]
    assert min(late) >= 0 and statistics.median(late) < 0.02 and max(late) < 0.2
    assert statistics.median(abs(a - b) for a, b in zip(arrivals, moments, strict=True)) < 0.02


def test_a_closed_loop_keeps_its_number_and_tells_who_waited() -> None:
    with ScriptedServer(lambda body, number: tokens(2, 0.05, 0.01)) as server:
        outcome = asyncio.run(run(load(server, 9, max_concurrency=3)))
        assert server.most_open == 3
    waited = sorted(record.start - record.due for record in outcome.records)
    assert waited[2] < 0.05 < waited[3] and waited[6] > 0.11
    assert outcome.ended - outcome.began > 0.17
    assert max(record.times[0] for record in outcome.records) < 0.15  # waiting for a place, up to 0.12 s, is not in it


def test_warm_ups_are_sent_before_and_not_counted() -> None:
    events: list[str] = []

    collecting: list[bool] = []

    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        events.append(body["prompt"])
        collecting.append(gc.isenabled())
        return tokens(1, 0.0, 0.0)

    with ScriptedServer(script) as server:
        given = load(server, 2, warmups=['{"prompt": "warm"}'] * 2, headers={"X-Who": "me"})
        outcome = asyncio.run(run(given, wait=lambda: events.append("wait")))
        assert all("X-Who: me" in head for head in server.headers)
    assert events[:3] == ["warm", "warm", "wait"] and len(outcome.records) == 2
    assert collecting == [True, True, False, False] and gc.isenabled()  # no garbage is collected during the run


def test_the_client_knows_what_it_costs_itself() -> None:
    """Half a second of work inside one answer's script runs in this very process, so that it must be seen."""

    def script(body: dict[str, Any], number: int) -> Iterable[Step]:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        return tokens(2, 0.0, 0.0)

    outcome = sent(script)
    assert outcome.cpu_seconds > 0.5
    assert outcome.busiest == pytest.approx(outcome.cpu_seconds / (outcome.ended - outcome.began), rel=0.05)


def test_an_event_costs_little() -> None:
    """About 20 µs of CPU where every event is a read of its own, so that one core sees tens of thousands per second."""
    with ScriptedServer(lambda body, number: tokens(200, 0.01, 0.004)) as server:
        outcome = send(load(server, 20), look=lambda: None, tell=lambda done: None)
    assert outcome.events == 20 * 201 and not any(record.error for record in outcome.records)
    assert outcome.cpu_seconds / outcome.events < 100e-6


def test_the_busiest_second_is_a_whole_one() -> None:
    seen = [(0.1 * tick, 0.0) for tick in range(31)]
    assert busiest_second(seen) == 0.0
    burst = [(moment, max(0.0, min(0.5, moment - 1))) for moment, _ in seen]  # half a second of work from 1.0 on
    assert busiest_second(burst) == pytest.approx(0.5, abs=0.06)
    assert busiest_second(burst[:6]) == 0.0 and busiest_second([(0.0, 0.0), (0.5, 0.4)]) == pytest.approx(0.8)
