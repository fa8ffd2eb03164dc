"""The routes of `trl vllm-serve` up to TRL 1.10."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest
from dialects import IDS, Logits, logprob, post

from tandem.server.text.text import Text


def test_routes_with_a_slash_are_others(http: httpx.Client) -> None:
    assert http.get("/health/").json()["status"] == "ok"
    assert http.get("/get_world_size/").json() == {"world_size": 1}
    assert http.post("/generate", json={"prompts": ["a"]}).status_code == 400
    assert http.post("/generate/", json={"text": "a"}).status_code == 400


def test_generate(http: httpx.Client, text: Text, hf_logits: Logits) -> None:
    body = {"prompts": [IDS, IDS[:4]], "n": 2, "max_tokens": 3, "images": None, "generation_kwargs": {"seed": 1}}
    found = post(http, "/generate/", **body)
    assert found["prompt_ids"] == [IDS, IDS[:4]] and len(found["completion_ids"]) == 4
    assert found["logprob_token_ids"] == [[[token] for token in ids] for ids in found["completion_ids"]]
    for place, ids in enumerate(found["completion_ids"]):
        prompt = found["prompt_ids"][place // 2]
        expected = [logprob(hf_logits, prompt + ids, len(prompt) + index) for index in range(len(ids))]
        assert [row[0] for row in found["logprobs"][place]] == pytest.approx(expected, abs=1e-4)
    again = post(http, "/generate/", prompts=["The cat"], logprobs=2, temperature=0, top_k=0)
    assert again["prompt_ids"] == [text.encode("The cat")]
    assert all(len(row) == 2 and row == sorted(row, reverse=True) for row in again["logprobs"][0])
    none = post(http, "/generate/", prompts=["a"], logprobs=None, guided_decoding_regex="[ab]{2}")
    assert none["logprobs"] is None and set(text.decode(none["completion_ids"][0])) <= {"a", "b"}


def test_chat(http: httpx.Client, text: Text) -> None:
    messages = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "No"}]]
    found = post(http, "/chat/", messages=messages, max_tokens=2, tools=None, chat_template_kwargs={})
    assert found["prompt_ids"] == [text.render(one) for one in messages]
    assert [len(ids) for ids in found["completion_ids"]] == [2, 2]


def test_sequence_logprobs(http: httpx.Client, hf_logits: Logits) -> None:
    sequences, lengths = [IDS, IDS[:6], IDS[:4]], [9, 6, 0]
    body = {"sequences": sequences, "prompt_lengths": lengths, "top_logprobs": 3}
    found = post(http, "/get_sequence_logprobs/", **body)
    assert [len(rows) for rows in found["logprobs"]] == [3, 0, 4]
    assert found["logprobs"][2][0] == found["logprob_token_ids"][2][0] == []
    for place in range(9, 12):
        row = hf_logits(IDS)[place - 1].log_softmax(-1)
        ids, values = found["logprob_token_ids"][0][place - 9], found["logprobs"][0][place - 9]
        assert ids[:3] == row.topk(3).indices.tolist() and set(ids) == {*ids[:3], IDS[place]}
        assert values == pytest.approx(row[ids].tolist(), abs=1e-4)
    packed = post(http, "/get_sequence_logprobs/", response_format="binary", temperature=2.0, **body)
    assert packed["shape"] == [3, 4, 3] and packed["completion_lengths"] == [3, 0, 4]
    actual = struct.unpack("<12f", base64.b64decode(packed["actual_logprobs_b64"]))
    ids = struct.unpack("<12i", base64.b64decode(packed["actual_token_ids_b64"]))
    likely = struct.unpack("<36f", base64.b64decode(packed["logprobs_b64"]))
    assert ids[:4] == (*IDS[9:], 0) and ids[8:] == (0, *IDS[1:4])
    assert actual[3] == actual[4] == actual[8] == float("-inf")
    assert actual[:3] == pytest.approx([logprob(hf_logits, IDS, place, 2.0) for place in (9, 10, 11)], abs=1e-4)
    assert likely[:3] == pytest.approx((hf_logits(IDS)[8] / 2).log_softmax(-1).topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/generate/", {"prompts": ["a"], "n": 0}, "n", "at least 1"),
        ("/generate/", {"prompts": ["a"], "generation_kwargs": {"x": 1}}, "x", "unknown field"),
        ("/get_sequence_logprobs/", {"sequences": [IDS], "prompt_lengths": []}, "prompt_lengths", "1 sequences"),
        ("/get_sequence_logprobs/", {"sequences": [IDS], "prompt_lengths": [13]}, "prompt_lengths", "0 to 12"),
        (
            "/get_sequence_logprobs/",
            {"sequences": [IDS], "prompt_lengths": [1], "top_logprobs": 101},
            "top_logprobs",
            "--max-logprobs",
        ),
        ("/init_communicator/", {}, None, "TRL 1.11"),
        (
            "/get_sequence_logprobs/",
            {"sequences": [[5, 6]], "prompt_lengths": [1], "temperature": 1e-6},
            "temperature",
            "least 1e-05",
        ),
    ],
)
def test_refusals(http: httpx.Client, path: str, body: dict[str, Any], param: str | None, words: str) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error
