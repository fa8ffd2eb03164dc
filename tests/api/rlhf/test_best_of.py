"""best_of and rank_by on chat and completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asking import refused

from tandem.server.text.text import Text

CHAT = [{"role": "user", "content": "Is it?"}]
DRAWN = {"model": "policy", "max_tokens": 8, "seed": 5, "return_token_ids": True}
Ask = Callable[..., dict[str, Any]]


def test_the_best_of_a_completion_by_reward(ask: Ask, reward_of: Callable[..., float]) -> None:
    prompts = [[1, 70, 75], [1, 33]]
    every = ask("/v1/completions", **DRAWN, prompt=prompts, n=6)["choices"]
    best = ask("/v1/completions", **DRAWN, prompt=prompts, n=2, best_of=6, rank_by="reward")
    for place, prompt in enumerate(prompts):
        own = every[6 * place : 6 * place + 6]
        rewards = {tuple(one["token_ids"]): reward_of("reward", prompt + one["token_ids"]) for one in own}
        expected = sorted(rewards, key=lambda ids: -rewards[ids])[:2]
        shown = best["choices"][2 * place : 2 * place + 2]
        assert [tuple(one["token_ids"]) for one in shown] == expected
        assert [one["reward"] for one in shown] == pytest.approx([rewards[ids] for ids in expected], abs=1e-5)
    assert [one["index"] for one in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in every)
    assert best["usage"]["prompt_tokens"] == 5


def test_the_prompt_is_computed_once_by_each_model(ask: Ask, computed: Callable[[str], int]) -> None:
    prompt = [1, *range(100, 200)]
    before = computed("policy"), computed("reward")
    usage = ask("/v1/completions", **DRAWN, prompt=prompt, best_of=8, rank_by="reward", ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 64
    assert computed("policy") - before[0] == 101 + 8 * 7  # the last token of an answer is not put in
    assert computed("reward") - before[1] == 101 + 64


def test_the_best_of_a_chat_by_reward(ask: Ask, reward_of: Callable[..., float], text: Text) -> None:
    answer = ask("/v1/chat/completions", **DRAWN, messages=CHAT, n=4, rank_by="reward")
    rewards = [one["reward"] for one in answer["choices"]]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 4
    assert [one["index"] for one in answer["choices"]] == [0, 1, 2, 3]
    ids = text.render(CHAT)
    assert rewards == pytest.approx(
        [reward_of("reward", ids + one["token_ids"]) for one in answer["choices"]], abs=1e-5
    )
    (best,) = ask("/v1/chat/completions", **DRAWN, messages=CHAT, best_of=4, rank_by="reward")["choices"]
    assert best["token_ids"] == answer["choices"][0]["token_ids"]


def test_a_judge_with_another_tokenizer_reads_the_text(ask: Ask) -> None:
    drawn = {**DRAWN, "stop": ["\n"]}
    answer = ask("/v1/chat/completions", **drawn, messages=CHAT, n=3, best_of=5, rank_by="judge")
    for one in answer["choices"]:
        message = {"role": "assistant", "content": one["message"]["content"]}
        if one["finish_reason"] == "stop":
            (alone,) = ask("/v1/rewards", model="judge", conversations=[[*CHAT, message]])["data"]
            assert one["reward"] == pytest.approx(alone["reward"], abs=1e-2)
    rewards = [one["reward"] for one in answer["choices"]]
    assert rewards == sorted(rewards, reverse=True)


def test_the_best_of_a_chat_by_log_probability(ask: Ask) -> None:
    every = ask("/v1/chat/completions", **DRAWN, messages=CHAT, n=5, logprobs=True)["choices"]
    means = [sum(entry["logprob"] for entry in one["logprobs"]["content"]) / len(one["token_ids"]) for one in every]
    answer = ask("/v1/chat/completions", **DRAWN, messages=CHAT, n=2, best_of=5)
    expected = sorted(range(5), key=lambda index: -means[index])[:2]
    assert [one["token_ids"] for one in answer["choices"]] == [every[index]["token_ids"] for index in expected]
    assert all(one["logprobs"] is None and "reward" not in one for one in answer["choices"])


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"best_of": 2, "n": 3}, "best_of", "at least n, 3"),
        ({"best_of": 2, "stream": True}, "best_of", "stream: true"),
        ({"rank_by": "reward", "stream": True}, "rank_by", "stream: true"),
        ({"rank_by": "policy"}, "rank_by", "policy model"),
        ({"rank_by": "", "best_of": 2}, "rank_by", "at least 1 character"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": CHAT}), ("/v1/completions", {"prompt": "a"})):
        refused(http, path, {"model": "policy", "max_tokens": 4, **prompt, **body}, param, words)
