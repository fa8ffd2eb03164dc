"""Streams of server-sent events: cut anywhere, in any wording that servers use."""

from __future__ import annotations

import json

import pytest

from tandem.benchmarks.bench.stream import Answer, Events, StreamError, reason_of

ONE, TWO = b'{"a": 1}', b'{"b": "x\\ny"}'
ODD = [
    b"data: " + ONE + b"\n\ndata: " + TWO + b"\n\n",
    b": a comment\r\n\r\ndata: " + ONE + b"\r\n\r\n: ping\r\n\r\nevent: x\r\nid: 7\r\ndata:" + TWO + b"\r\n\r\n",
    b"\r\rdata: " + ONE + b"\r\rdata: " + TWO + b"\r\r",
    b"data: " + ONE + b"\ndata: " + TWO + b"\n\n",  # one event of two documents
    b'\n\n\n\ndata: {"a":\ndata: 1}\n\n\n\nretry: 5\ndata: ' + TWO + b"\n\n",  # one document on two lines
    b'data: {"a":\r\ndata: 1}\r\n\r\ndata: ' + TWO + b"\r\n\r\n",  # where a cut between CR and LF matters
    b"data: " + ONE + b"\n\ndata: " + TWO,  # no empty line at the end
]


def read(pieces: list[bytes]) -> list[object]:
    stream = Events()
    found = [event for piece in pieces for event in stream.feed(piece)]
    return [json.loads(event) for event in [*found, *stream.close()]]


@pytest.mark.parametrize("data", ODD)
def test_events_are_the_same_however_the_bytes_are_cut(data: bytes) -> None:
    expected = [{"a": 1}, {"b": "x\ny"}]
    assert read([data]) == expected
    assert read([data[index : index + 1] for index in range(len(data))]) == expected
    for cut in range(1, len(data)):
        assert read([data[:cut], data[cut:]]) == expected, cut


def test_a_finished_event_does_not_wait_for_the_next() -> None:
    for end in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        assert Events().feed(b"data: 1" + end) == [b"1"]


def chunk(**choice: object) -> bytes:
    return json.dumps({"id": "x", "choices": [{"index": 0, **choice}]}).encode()


def test_only_chunks_with_content_are_arrivals() -> None:
    answer = Answer(start=100.0)
    answer.take(chunk(delta={"role": "assistant", "content": ""}), 100.1)
    answer.take(chunk(delta={"reasoning_content": "hm"}), 100.2)
    answer.take(chunk(delta={"content": "a"}), 100.3)
    answer.take(chunk(delta={"content": ""}), 100.35)
    answer.take(chunk(delta={"tool_calls": [{"index": 0}]}), 100.4)
    answer.take(chunk(text="", token_ids=[5]), 100.5)
    answer.take(chunk(delta={}, finish_reason="stop"), 100.6)
    answer.take(b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}', 100.7)
    answer.take(b"[DONE]", 100.8)
    assert answer.times == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert answer.end == pytest.approx(0.6)  # the usage and [DONE] are no part of the answer
    assert (answer.text, answer.finish_reason, answer.missing()) == ("hma", "stop", "")
    assert (answer.told("prompt_tokens"), answer.told("completion_tokens")) == (7, 4)
    assert answer.told("prompt_tokens_details", "cached_tokens") is None


def test_a_stream_that_ends_early_or_says_nothing_is_no_answer() -> None:
    half, empty = Answer(0.0), Answer(0.0)
    half.take(chunk(text="a"), 1.0)
    empty.take(chunk(text="", finish_reason="stop"), 1.0)
    assert "ended early" in half.missing()
    assert "no content (finish_reason stop)" in empty.missing()


@pytest.mark.parametrize(
    "data, words",
    [
        (b'{"error": {"message": "engine died", "code": 500}}', "engine died"),
        (b'{"error": "engine died"}', "engine died"),
        (b"<html>", "no chunk of an answer"),
        (b"[1]", "no chunk of an answer"),
    ],
)
def test_errors_in_a_stream_are_said(data: bytes, words: str) -> None:
    with pytest.raises(StreamError, match=words):
        Answer(0.0).take(data, 1.0)


def test_reasons_are_found_in_every_wording() -> None:
    assert reason_of(b'{"error": {"message": "no"}}') == "no"
    assert reason_of(b'{"detail": "not found"}') == "not found"
    assert reason_of(b'{"object": "error", "message": "bad"}') == "bad"
    assert reason_of(b"<h1>502\n Bad Gateway</h1>") == "<h1>502 Bad Gateway</h1>"
    assert len(reason_of(b"x" * 10_000)) < 400
