"""POST /v1/rewards against transformers."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tandem.server.text.text import Text

Score = Callable[[list[int]], float]
TEXTS = ["The cat sat on the mat.", "a", "猫坐在垫子上", "One, two, three, four " * 20]


def rewards(http: httpx.Client, **body: object) -> dict:
    answer = http.post("/v1/rewards", json={"model": "reward", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_scores_are_transformers(http: httpx.Client, text: Text, hf_score: Score) -> None:
    encoded = [text.encode(one) for one in TEXTS]
    by_text, by_ids = rewards(http, input=TEXTS), rewards(http, input=encoded)
    assert by_text["object"] == "list" and by_text["model"] == "reward" and by_text["weight_version"] == 0
    assert [entry["reward"] for entry in by_ids["data"]] == pytest.approx(
        [entry["reward"] for entry in by_text["data"]], abs=1e-5
    )
    for index, (entry, ids) in enumerate(zip(by_text["data"], encoded, strict=True)):
        assert entry["index"] == index and entry["prompt_tokens"] == len(ids)
        assert entry["pooled_index"] == len(ids) - 1
        assert entry["reward"] == entry["raw_reward"] == pytest.approx(hf_score(ids), abs=1e-4)
        assert entry["reward"] != 0
    assert by_text["usage"]["prompt_tokens"] == sum(map(len, encoded)) == by_text["usage"]["total_tokens"]
    alone = [rewards(http, input=one)["data"][0]["reward"] for one in TEXTS]
    assert alone == pytest.approx([entry["reward"] for entry in by_text["data"]], abs=1e-5)


def test_conversations_are_rendered_without_an_open_turn(http: httpx.Client, text: Text, hf_score: Score) -> None:
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    (entry,) = rewards(http, conversations=[messages])["data"]
    ids = text.render(messages, add_generation_prompt=False)
    assert entry["prompt_tokens"] == len(ids)
    assert entry["reward"] == pytest.approx(hf_score(ids), abs=1e-4)


def test_the_model_may_be_left_out(http: httpx.Client) -> None:
    assert http.post("/v1/rewards", json={"input": "a"}).json()["model"] == "reward"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": "policy", "input": "a"}, "model", "policy model"),
        ({}, "input", "either input or conversations"),
        ({"input": "a", "conversations": [[]]}, "conversations", "1 to"),
        ({"input": []}, "input", "at least one"),
        ({"input": [[]]}, "input", "not empty"),
        ({"input": [320]}, "input", "token id 320"),
        ({"input": ["a"] * 1025}, "input", "at most 1024"),
        ({"input": [5] * 2049}, "input", "has 2049 tokens"),
        ({"conversations": [[{"role": "user", "content": "a"}], [{"role": "user"}]]}, "conversations", "needs content"),
        ({"conversations": [[{"role": "user", "content": [{"type": "audio"}]}]]}, "conversations", "only text"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
        ({"input": "a", "timeout": 0}, "timeout", "greater than 0"),
    ],
)
def test_refusals(http: httpx.Client, body: dict, param: str, words: str) -> None:
    answer = http.post("/v1/rewards", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"].split("[")[0] == param and words in error["message"], error


def test_an_unknown_model(http: httpx.Client) -> None:
    answer = http.post("/v1/rewards", json={"model": "judge", "input": "a"})
    assert answer.status_code == 404 and "reward" in answer.json()["error"]["message"]
