"""vLLM's /inference/v1/generate."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from dialects import IDS, Logits, events, greedy, logprob, post


def test_token_ids(http: httpx.Client, hf_logits: Logits) -> None:
    params = {"max_tokens": 4, "temperature": 0, "logprobs": 1}
    found = post(http, "/inference/v1/generate", request_id="mine", token_ids=IDS, sampling_params=params)
    (choice,) = found["choices"]
    assert found["request_id"] == "mine" and found["model"] == "policy"
    assert choice["token_ids"] == greedy(hf_logits, IDS, 4) and choice["finish_reason"] == "length"
    every = IDS + choice["token_ids"]
    for index, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["token_id"] == choice["token_ids"][index] and entry["rank"] == 1
        assert entry["logprob"] == pytest.approx(logprob(hf_logits, every, len(IDS) + index), abs=1e-4)
        assert entry["top_logprobs"] == [{name: entry[name] for name in ("token_id", "logprob", "rank")}]
    assert found["prompt_logprobs"] is None and found["prompt_token_ids"] is None
    assert found["usage"]["completion_tokens"] == 4


def test_prompt_logprobs_name_the_actual_token_first(http: httpx.Client, hf_logits: Logits) -> None:
    """What prime-rl reads: the first entry of each. The temperature is the answer's alone."""
    params = {"max_tokens": 1, "temperature": 0.5, "top_p": 1, "prompt_logprobs": 1}
    body = {"token_ids": IDS, "sampling_params": params, "cache_salt": "7", "priority": 1}
    found = post(http, "/inference/v1/generate", model="policy", return_token_ids=True, **body)
    assert found["prompt_token_ids"] == IDS and found["prompt_logprobs"][0] is None
    for place, entry in enumerate(found["prompt_logprobs"][1:], 1):
        token_id, first = next(iter(entry.items()))
        assert int(token_id) == IDS[place]
        assert first["logprob"] == pytest.approx(logprob(hf_logits, IDS, place), abs=1e-4)


def test_without_a_length_the_context_is_filled(http: httpx.Client) -> None:
    params = {"ignore_eos": True, "seed": 1, "n": 2}
    found = post(http, "/inference/v1/generate", token_ids=[5] * 500, sampling_params=params)
    assert [len(choice["token_ids"]) for choice in found["choices"]] == [12, 12]


def test_the_stream_says_the_same(http: httpx.Client) -> None:
    body = {"token_ids": IDS, "sampling_params": {"max_tokens": 6, "seed": 3, "logprobs": 2, "n": 2}}
    whole = post(http, "/inference/v1/generate", output_mode="text", **body)
    told = events(http, "/inference/v1/generate", output_mode="text", stream_options={"include_usage": True}, **body)
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 12
    for choice in whole["choices"]:
        parts = [part for event in told for part in event["choices"] if part["index"] == choice["index"]]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert "".join(part["text"] for part in parts) == choice["text"]
        columns = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert columns == choice["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"sampling_params": {}}, "token_ids", "missing"),
        ({"token_ids": [], "sampling_params": {}}, "token_ids", "at least 1"),
        ({"token_ids": [320], "sampling_params": {}}, "token_ids", "token id 320"),
        ({"token_ids": [5], "sampling_params": {"temperature": 3}}, "sampling_params.temperature", "at most 2"),
        ({"token_ids": [5], "sampling_params": {"temprature": 1}}, "sampling_params.temprature", "did you mean"),
        ({"token_ids": [5], "sampling_params": {"watermarking": True}}, "sampling_params.watermarking", "marked"),
        ({"token_ids": [5], "sampling_params": {"max_tokens": 512}}, "max_tokens", "holds 512"),
        ({"token_ids": [5], "sampling_params": {}, "features": {"a": 1}}, "features", "text only"),
        ({"token_ids": [5], "sampling_params": {}, "model": "reward"}, "model", "reward model"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/inference/v1/generate", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error
