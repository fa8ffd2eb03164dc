"""Bytes -> JSON values, and the refusals on the way."""

from __future__ import annotations

import pytest

from tandem.server.api.body import MAX_DEPTH, parse
from tandem.server.api.errors import ApiError


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"[1", "line 1 column 3"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": "\xff"}', "byte 0xff at 7"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\uDC00\\uD800"}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (nested(MAX_DEPTH + 1), "deeper than"),
        (b"[" * 100_000, "deeper than"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than"),
    ],
    ids=range(11),
)
def test_what_is_no_json_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        parse(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (nested(1), {"a": 1}),
        (b'"\\ud83d\\ude42"', "🙂"),
        ('"🙂\u2028"'.encode(), "🙂\u2028"),
        (b"[1, 2.5, null, true]", [1, 2.5, None, True]),
        (b'{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_json_is_read(raw: bytes, value: object) -> None:
    assert parse(raw) == (value, [])


def test_the_deepest_that_is_allowed() -> None:
    parse(nested(MAX_DEPTH))


def test_constants_that_json_lacks_are_reported_with_the_value() -> None:
    value, constants = parse(b'{"a": -Infinity, "b": NaN}')
    assert value["a"] == float("-inf") and constants == ["-Infinity", "NaN"]
