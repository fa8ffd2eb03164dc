"""/v1/completions as TRL, AReaL and distillation teachers call it: the traps that `rlhf_clients.md` lists."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from dialects import IDS, Logits, greedy, logprob, post

from tandem.server.text.text import Text

TRL: dict[str, Any] = {"n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
TRL |= {"max_tokens": 4, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}


@pytest.mark.parametrize("prompt", ["The cat", ["The cat", "One"], IDS, [IDS, IDS[:5]]])
def test_choices_are_prompt_major_and_hold_the_ids(http: httpx.Client, text: Text, prompt: Any) -> None:
    choices = post(http, "/v1/completions", model="policy", prompt=prompt, **TRL)["choices"]
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [text.encode(one) if isinstance(one, str) else one for one in many]
    assert [choice["index"] for choice in choices] == list(range(2 * len(many)))
    assert [choice["prompt_token_ids"] for choice in choices] == [one for one in ids for _ in range(2)]
    for choice in choices:
        columns = choice["logprobs"]
        assert columns["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        drawn = [{token: value} for token, value in zip(columns["tokens"], columns["token_logprobs"], strict=True)]
        assert columns["top_logprobs"] == drawn  # the drawn token alone: 0 is not null
    plain = post(http, "/v1/completions", prompt=prompt, max_tokens=1, logprobs=None)["choices"]
    assert all(choice["logprobs"] is None and "token_ids" not in choice for choice in plain)


def test_the_token_that_ended_it_belongs_to_the_ids(http: httpx.Client) -> None:
    body = {"prompt": IDS, "logit_bias": {"2": 100}, "logprobs": 0, "return_token_ids": True, "max_tokens": 4}
    choice = post(http, "/v1/completions", **body)["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"], choice["text"]) == ([2], "stop", "")
    assert len(choice["logprobs"]["token_logprobs"]) == 1


def test_a_model_may_be_missing_but_not_unknown(http: httpx.Client) -> None:
    assert post(http, "/v1/completions", prompt="a", max_tokens=1)["model"] == "policy"
    assert http.post("/v1/completions", json={"model": "model", "prompt": "a"}).status_code == 404


def test_ways_to_turn_top_k_off(http: httpx.Client) -> None:
    answers = [
        post(http, "/v1/completions", prompt=IDS, max_tokens=8, seed=5, return_token_ids=True, **more)["choices"][0]
        for more in ({}, {"top_k": 0}, {"top_k": -1}, {"top_k": 100_000_000})
    ]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1


def test_temperature_is_the_answers_alone(http: httpx.Client, hf_logits: Logits) -> None:
    """AReaL asks for a teacher's log-probabilities at temperature 0, TRL at its own."""
    areal = {"prompt": IDS, "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 1, "echo": True}
    for temperature in (0.0, 2.0):
        choice = post(http, "/v1/completions", temperature=temperature, **areal)["choices"][0]
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(IDS)
        for place, entry in enumerate(choice["prompt_logprobs"][1:], 1):
            token_id, first = next(iter(entry.items()))
            row = hf_logits(IDS)[place - 1]
            assert token_id == str(IDS[place]) and first["rank"] == 1 + (row > row[IDS[place]]).sum().item()
            assert first["logprob"] == pytest.approx(logprob(hf_logits, IDS, place), abs=1e-4)


def test_areals_rollout(http: httpx.Client, hf_logits: Logits) -> None:
    body = {"prompt": IDS, "top_p": 1.0, "top_k": 100_000_000, "max_tokens": 3, "temperature": 0.0}
    body |= {"stop_token_ids": [], "ignore_eos": False, "skip_special_tokens": True, "stream": False}
    choice = post(http, "/v1/completions", return_tokens_as_token_ids=True, logprobs=0, use_beam_search=False, **body)[
        "choices"
    ][0]
    assert [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]] == greedy(hf_logits, IDS, 3)


def test_every_post_that_trl_reads_is_200_and_json(http: httpx.Client) -> None:
    for path in ("/reset_prefix_cache", "/pause?mode=keep", "/resume"):
        answer = http.post(path)
        assert answer.status_code == 200 and isinstance(answer.json(), dict), path
