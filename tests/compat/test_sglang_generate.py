"""SGLang's /generate, as slime and AReaL call it too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import httpx
import pytest
from dialects import IDS, Logits, events, greedy, logprob, post

from tandem.server.text.text import Text


def test_a_text(http: httpx.Client, text: Text, hf_logits: Logits) -> None:
    found = post(http, "/generate", text="The cat", sampling_params={"temperature": 0, "max_new_tokens": 5})
    ids = text.encode("The cat")
    assert found["output_ids"] == greedy(hf_logits, ids, 5) and found["text"] == text.decode(found["output_ids"])
    meta = found["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (len(ids), 5, "0")
    assert "output_token_logprobs" not in meta


def test_what_slime_and_areal_send(http: httpx.Client, hf_logits: Logits) -> None:
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": 100_000_000, "max_new_tokens": 6, "stop_token_ids": None}
    params |= {"skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False}
    body = {"input_ids": IDS, "image_data": [], "return_logprob": True, "sampling_params": params | {"stop": None}}
    found = post(http, "/generate", **body)
    rows = found["meta_info"]["output_token_logprobs"]
    assert [row[1] for row in rows] == found["output_ids"] and {row[2] for row in rows} == {None}
    every = IDS + found["output_ids"]
    for index, (value, _, _) in enumerate(rows):
        assert value == pytest.approx(logprob(hf_logits, every, len(IDS) + index), abs=1e-4)
    assert found["meta_info"]["input_token_logprobs"] == []
    assert found["meta_info"]["finish_reason"]["type"] in ("length", "stop")


def test_a_teachers_logprobs_need_no_answer(http: httpx.Client, hf_logits: Logits) -> None:
    params = {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False}
    body = {"input_ids": IDS, "sampling_params": params, "return_logprob": True}
    found = post(http, "/generate", logprob_start_len=0, **body)
    assert found["output_ids"] == [] and found["text"] == ""
    rows = found["meta_info"]["input_token_logprobs"]
    assert [row[1] for row in rows] == IDS and rows[0][0] is None
    expected = [logprob(hf_logits, IDS, place) for place in range(1, len(IDS))]
    assert [row[0] for row in rows[1:]] == pytest.approx(expected, abs=1e-4)
    tail = post(http, "/generate", logprob_start_len=8, top_logprobs_num=2, **body)["meta_info"]
    assert [row[1] for row in tail["input_token_logprobs"]] == IDS[8:]
    assert [row[0] for row in tail["input_token_logprobs"]] == pytest.approx(expected[7:], abs=1e-4)
    assert [len(row) for row in tail["input_top_logprobs"]] == [2] * 4
    assert post(http, "/generate", logprob_start_len=len(IDS), **body)["meta_info"]["input_token_logprobs"] == []


def test_a_batch_has_parameters_each(http: httpx.Client, text: Text) -> None:
    prompts = ["The cat", "One, two"]
    params = [{"max_new_tokens": count, "ignore_eos": True} for count in (2, 3)]
    found = post(http, "/generate", text=prompts, sampling_params=params, return_logprob=[True, False], rid=["a", "b"])
    assert [len(one["output_ids"]) for one in found] == [2, 3]
    assert [one["meta_info"]["id"] for one in found] == ["a", "b"]
    assert ["output_token_logprobs" in one["meta_info"] for one in found] == [True, False]
    assert isinstance(post(http, "/generate", text=["a"], sampling_params={"max_new_tokens": 1}), list)
    many = post(http, "/generate", text="a", sampling_params={"max_new_tokens": 2, "n": 3, "sampling_seed": 1})
    assert len(many) == 3 and len({tuple(one["output_ids"]) for one in many}) > 1


def test_a_seed_repeats(http: httpx.Client) -> None:
    params = {"max_new_tokens": 8, "sampling_seed": 7, "top_k": -1}
    first, again = (post(http, "/generate", input_ids=IDS, sampling_params=params) for _ in range(2))
    assert first["output_ids"] == again["output_ids"]


def test_forms(http: httpx.Client) -> None:
    forms = {"regex": "[ab]{3}", "json_schema": '{"enum": ["aba"]}', "ebnf": 'root ::= "aba"'}
    for name, form in forms.items():
        found = post(http, "/generate", text="The", sampling_params={name: form, "max_new_tokens": 16})
        assert set(found["text"].strip('"')) <= {"a", "b"} and found["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_stop_says_what_matched(http: httpx.Client, text: Text, hf_logits: Logits) -> None:
    drawn = greedy(hf_logits, IDS, 12)
    params = {"temperature": 0, "max_new_tokens": 12}
    third = drawn[2]
    found = post(http, "/generate", input_ids=IDS, sampling_params=params | {"stop_token_ids": [third]})
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": third}
    assert found["output_ids"] == drawn[: drawn.index(third) + 1]
    word = text.decode(drawn)[3:5]
    found = post(http, "/generate", input_ids=IDS, sampling_params=params | {"stop": word})
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": word} and word not in found["text"]
    kept = post(http, "/generate", input_ids=IDS, sampling_params=params | {"stop": word, "no_stop_trim": True})
    assert kept["text"] == found["text"] + word


def test_a_stream_says_all_of_it_again(http: httpx.Client) -> None:
    body = {"input_ids": [IDS, IDS[:5]], "return_logprob": True, "logprob_start_len": 0}
    body["sampling_params"] = {"max_new_tokens": 5, "sampling_seed": 2}
    whole = post(http, "/generate", **body)
    told = events(http, "/generate", **body)
    for index, answer in enumerate(whole):
        own = [event for event in told if event["index"] == index]
        assert own[-1]["text"] == answer["text"] and own[-1]["output_ids"] == answer["output_ids"]
        assert all(b["text"].startswith(a["text"]) for a, b in pairwise(own))
        for name in ("output_token_logprobs", "input_token_logprobs", "finish_reason"):
            assert own[-1]["meta_info"][name] == answer["meta_info"][name]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "text", "either text"),
        ({"text": "a", "input_ids": [5]}, "text", "either text"),
        ({"text": "a", "sampling_params": {"top_q": 1}}, "sampling_params.top_q", "unknown field"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens", "at least 0"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 999}}, "max_new_tokens", "999"),
        ({"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params", "one of"),
        ({"text": "a", "sampling_params": {"beam_width": 2}}, "sampling_params.beam_width", "beam"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "must be 2"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len", "99"),
        ({"text": "a", "token_ids_logprob": [5]}, "token_ids_logprob", "not supported"),
        ({"text": "a", "lora_path": "nobody"}, "model", "not hosted"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/generate", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param and words in error["message"], error
