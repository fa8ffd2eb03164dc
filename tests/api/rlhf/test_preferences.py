"""POST and GET /v1/rlhf/preferences: rankings, a line each."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import refused

from tandem.server.api.rlhf.preferences import append, lines

PATH = "/v1/rlhf/preferences"
CHAT = [{"role": "user", "content": "猫?"}]
GOOD: dict[str, Any] = {"prompt": "The cat", "completions": ["a", "b", "c"], "ranking": [2, [0, 1]]}


def test_what_is_ranked_comes_back(http: httpx.Client, preferences: Path) -> None:
    before = http.get(PATH).text.splitlines()
    answer = http.post(PATH, json={**GOOD, "scores": [0.5, None, 2], "model": "policy", "metadata": {"by": "me"}})
    assert answer.status_code == 200 and answer.json() == {"object": "preference", "completions": 3, "pairs": 2}
    chat = {"messages": CHAT, "completions": [{"role": "assistant", "content": "是"}, "不"], "ranking": [1, 0]}
    assert http.post(PATH, json=chat).json()["pairs"] == 1
    got = http.get(PATH)
    assert got.headers["content-type"].startswith("application/jsonl")
    first, second = [json.loads(line) for line in got.text.splitlines()[len(before) :]]
    assert first.pop("created") > 1.7e9
    assert first == {
        "prompt": "The cat",
        "completions": ["a", "b", "c"],
        "ranking": [[2], [0, 1]],
        "scores": [0.5, None, 2.0],
        "model": "policy",
        "metadata": {"by": "me"},
    }
    assert second["messages"] == CHAT and second["completions"] == chat["completions"]
    assert preferences.read_text() == got.text and preferences.stat().st_mode & 0o777 == 0o600


def test_many_writers_make_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    assert list(lines(file)) == []
    long = "x" * 100_000

    def write(number: int) -> None:
        for turn in range(5):
            append(file, json.dumps([number, turn, long]).encode() + b"\n")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in b"".join(lines(file)).splitlines()]
    assert sorted(line[:2] for line in found) == [[number, turn] for number in range(8) for turn in range(5)]


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    file = tmp_path / "kept.jsonl"
    append(file, b"{}\n")
    real = os.write
    monkeypatch.setattr("os.write", lambda descriptor, line: real(descriptor, line[:2]))
    with pytest.raises(OSError, match="No space left"):
        append(file, b'{"a": 1}\n')
    assert file.read_bytes() == b"{}\n"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"completions": ["a"]}, "completions", "at least 2"),
        ({"ranking": [0, 1]}, "ranking", "each completion once, 0 to 2"),
        ({"ranking": [0, 1, 1]}, "ranking", "each completion once"),
        ({"ranking": [0, 1, 3]}, "ranking", "each completion once"),
        ({"ranking": [[0, 1, 2], []]}, "ranking", "each completion once"),
        ({"prompt": None}, "prompt", "either prompt or messages"),
        ({"messages": CHAT}, "prompt", "either prompt or messages"),
        ({"scores": [1]}, "scores", "has 1 entries"),
    ],
)
def test_refusals(http: httpx.Client, change: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {**GOOD, **change}, param, words)
