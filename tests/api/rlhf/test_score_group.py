"""POST /v1/rlhf/score_group: as /v1/rewards scores each whole, with the prompt computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asking import refused

from tandem.server.text.text import Text

PATH = "/v1/rlhf/score_group"
ANSWERS = [" on the mat.", "!", "猫坐在垫子上", " and the dog ran after the ball. " * 4]
Ask = Callable[..., dict[str, Any]]


def test_texts_score_as_they_do_alone(ask: Ask, reward_of: Callable[..., float], text: Text) -> None:
    answer = ask(PATH, model="reward", prompt="The cat sat", completions=[{"text": one} for one in ANSWERS])
    expected = [reward_of("reward", "The cat sat" + one) for one in ANSWERS]
    assert answer["scores"] == answer["raw_scores"] == pytest.approx(expected, abs=1e-5)
    assert answer["ranking"] == sorted(range(4), key=lambda index: -expected[index])
    wholes = [text.encode("The cat sat" + one) for one in ANSWERS]
    assert answer["pooled_index"] == [len(whole) - 1 for whole in wholes]
    usage = answer["usage"]
    assert usage["prefill_tokens_unshared"] == sum(map(len, wholes))
    assert usage["prefill_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prefill_tokens"] < usage["prefill_tokens_unshared"]
    assert "pairs" not in answer and answer["object"] == "score_group" and answer["weight_version"] == 0


def test_token_ids_and_pairs(ask: Ask, reward_of: Callable[..., float]) -> None:
    prompt, members = [1, 70, 75, 80], [[71, 72], [90], [101, 33, 40]]
    completions = [{"token_ids": member} for member in members]
    answer = ask(PATH, model="reward", prompt_token_ids=prompt, completions=completions, pairwise=True)
    scores = answer["scores"]
    assert scores == pytest.approx([reward_of("reward", prompt + member) for member in members], abs=1e-5)
    assert [(pair["i"], pair["j"]) for pair in answer["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    for pair in answer["pairs"]:
        assert (pair["p_i_over_j"] > 0.5) == (scores[pair["i"]] > scores[pair["j"]])
    assert answer["usage"]["prefill_tokens"] == 4 + 6 and answer["usage"]["prefill_tokens_unshared"] == 3 * 4 + 6


def test_the_prompt_is_computed_once(ask: Ask, computed: Callable[[str], int]) -> None:
    prompt, members = [1, *range(20, 120)], [[200 + i, *range(30, 55)] for i in range(9)]
    before = computed("reward")
    completions = [{"token_ids": ids} for ids in members]
    usage = ask(PATH, model="reward", prompt_token_ids=prompt, completions=completions)["usage"]
    assert computed("reward") - before == usage["prefill_tokens"] == 101 + 9 * 26
    assert usage["prefill_tokens_unshared"] == 9 * (101 + 26)


def test_messages_are_rendered_in_the_reward_models_template(ask: Ask, judge_text: Text) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answers = [{"role": "assistant", "content": f"The capital of France is {city}."} for city in ("Oslo", "Paris")]
    answer = ask(
        PATH, model="judge", messages=chat, completions=[{"message": answers[0]}, {"text": answers[1]["content"]}]
    )
    whole = ask("/v1/rewards", model="judge", conversations=[[*chat, one] for one in answers])["data"]
    assert answer["scores"] == pytest.approx([entry["reward"] for entry in whole], abs=1e-3)
    assert answer["ranking"] == [1, 0]
    assert answer["usage"]["prompt_tokens"] == len(judge_text.render(chat))
    assert answer["pooled_index"] == [entry["pooled_index"] for entry in whole]


def test_a_group_of_one_and_of_many(ask: Ask, reward_of: Callable[..., float]) -> None:
    members = [[5 + i % 300, 70 + i % 200] for i in range(100)]
    for count in (1, 100):
        completions = [{"token_ids": member} for member in members[:count]]
        scores = ask(PATH, model="reward", prompt_token_ids=[1, 70], completions=completions)["scores"]
        assert len(scores) == count and scores[0] == pytest.approx(reward_of("reward", [1, 70, *members[0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "completions", "missing"),
        ({"completions": []}, "completions", "at least 1"),
        ({"completions": [{}]}, "completions[0]", "one of token_ids, text and message"),
        ({"completions": [{"text": "a", "token_ids": [5]}]}, "completions[0]", "one of token_ids"),
        ({"completions": [{"token_ids": [320]}]}, "completions[0].token_ids", "token id 320"),
        ({"completions": [{"message": {"role": "assistant", "content": "a"}}]}, "completions[0].message", "messages"),
        ({"completions": [{"text": "a"}, {"token_ids": [5] * 600}]}, "completions[1]", "takes 512 together"),
        ({"completions": [{"text": "a"}] * 129, "pairwise": True}, "pairwise", "at most 128"),
        ({"completions": [{"text": "a"}], "messages": [{"role": "user", "content": "a"}]}, "prompt", "send one of"),
        ({"completions": [{"text": "a"}], "model": "policy"}, "model", "policy model"),
        ({"completions": [{"text": "a"}], "model": "critic"}, "model", "value model"),
        ({"completions": [{"text": "a"}], "pool": "eos"}, "pool", "checkpoint"),
        ({"completions": [{"text": "a"}], "n": 2}, "n", "unknown field"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {"model": "reward", "prompt": "The cat", **body}, param, words)


def test_an_unknown_model(http: httpx.Client) -> None:
    refused(http, PATH, {"model": "none", "prompt": "a", "completions": [{"text": "b"}]}, "model", "reward", 404)
