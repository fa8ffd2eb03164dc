"""POST /v1/rlhf/evaluate against transformers, and against the routes that give each number alone."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asking import refused

from tandem.server.text.text import Text

PATH = "/v1/rlhf/evaluate"
EOS = 2
PROMPTS = [[1, 70, 75, 80, 71], [1, 33, 40]]
COMPLETIONS = [[[72, 90, 101, EOS], [57]], [[300, 71, 72], [88, EOS], [5, 6, 7]]]
GROUPS = [
    {"prompt_token_ids": prompt, "completions": [{"token_ids": ids} for ids in completions]}
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True)
]
MODELS = {"reward": "reward"}  # there are two of these, and one in every other role
EVERYTHING = ["policy_logprobs", "ref_logprobs", "values", "reward", "kl", "token_rewards"]
EACH = [(g, c) for g, completions in enumerate(COMPLETIONS) for c in range(len(completions))]
Ask = Callable[..., dict[str, Any]]
Logprobs = Callable[[list[int], list[int], float], list[float]]


@pytest.fixture(scope="module")
def everything(ask: Ask) -> dict[str, Any]:
    return ask(PATH, groups=GROUPS, models=MODELS, want=EVERYTHING, kl_coef=0.1, temperature=0.7)


def test_everything_is_transformers(
    everything: dict[str, Any],
    hf_logprobs: Callable[[str], Logprobs],
    hf_values: Callable[[list[int]], list[float]],
    reward_of: Callable[..., float],
) -> None:
    policy, reference = hf_logprobs("policy"), hf_logprobs("sft")
    for g, c in EACH:
        prompt, ids = PROMPTS[g], COMPLETIONS[g][c]
        found = everything["groups"][g]["completions"][c]
        ours, theirs = policy(prompt, ids, 0.7), reference(prompt, ids, 0.7)
        assert found["policy_logprobs"] == pytest.approx(ours, abs=1e-4)
        assert found["ref_logprobs"] == pytest.approx(theirs, abs=1e-4)
        behind = hf_values(prompt + ids)[len(prompt) - 1 :]  # before the first token, ..., behind the last
        assert found["values"] == pytest.approx(behind[:-1] if ids[-1] == EOS else behind, abs=1e-4)
        assert found["reward"] == found["raw_reward"] == pytest.approx(reward_of("reward", prompt + ids), abs=1e-5)
        assert found["pooled_index"] == len(prompt) + len(ids) - 1 and found["tokens"] == "given"
        kl = [a - b for a, b in zip(found["policy_logprobs"], found["ref_logprobs"], strict=True)]
        assert found["kl"] == pytest.approx(kl, abs=1e-6)
        rewards = [-0.1 * value for value in kl]
        rewards[-1] += found["reward"]
        assert found["token_rewards"] == pytest.approx(rewards, abs=1e-6)


def test_what_stands_around_it(everything: dict[str, Any]) -> None:
    assert everything["models"] == {"policy": "policy", "reference": "sft", "reward": "reward", "value": "critic"}
    assert everything["weight_versions"] == dict.fromkeys(everything["models"], 0)
    prompt, completion = sum(map(len, PROMPTS)), sum(len(ids) for group in COMPLETIONS for ids in group)
    usage = everything["usage"]
    assert usage["prompt_tokens"] == prompt and usage["completion_tokens"] == completion
    assert usage["prefill_tokens"] == 4 * (prompt + completion)
    assert usage["prefill_tokens_unshared"] == 4 * (2 * len(PROMPTS[0]) + 3 * len(PROMPTS[1]) + completion)
    assert set(everything["timing_ms"]) == {"policy", "reference", "reward", "value", "total"}
    assert all(value > 0 for value in everything["timing_ms"].values())


def test_log_probabilities_are_those_of_prompts(ask: Ask) -> None:
    answer = ask(PATH, groups=GROUPS, want=["policy_logprobs"])
    wholes = [PROMPTS[g] + COMPLETIONS[g][c] for g, c in EACH]
    alone = ask("/v1/completions", model="policy", prompt=wholes, max_tokens=0, prompt_logprobs=0)["choices"]
    for (g, c), whole, choice in zip(EACH, wholes, alone, strict=True):
        start = len(PROMPTS[g])
        expected = [choice["prompt_logprobs"][i][str(whole[i])]["logprob"] for i in range(start, len(whole))]
        found = answer["groups"][g]["completions"][c]
        assert set(found) == {"policy_logprobs"}
        assert found["policy_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert answer["weight_versions"] == {"policy": 0}


def test_base64_says_the_same(ask: Ask, everything: dict[str, Any]) -> None:
    body = {"groups": GROUPS, "models": MODELS, "want": EVERYTHING, "kl_coef": 0.1, "temperature": 0.7}
    packed = ask(PATH, **body, encoding="b64_f32")
    for g, c in EACH:
        plain, found = everything["groups"][g]["completions"][c], packed["groups"][g]["completions"][c]
        for name in ("policy_logprobs", "ref_logprobs", "values", "kl", "token_rewards"):
            raw = base64.b64decode(found[name])
            assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(plain[name], abs=1e-5), name
        assert found["reward"] == pytest.approx(plain["reward"], abs=1e-5)


def test_how_a_sequence_ended(ask: Ask) -> None:
    def values(finish: str | None, **body: object) -> int:
        group = {"prompt_token_ids": [1, 70], "completions": [{"token_ids": [71, 72], "finish_reason": finish}]}
        return len(ask(PATH, groups=[group], want=["values"], **body)["groups"][0]["completions"][0]["values"])

    assert (values("length"), values("stop"), values(None)) == (3, 2, 3)
    assert values("length", bootstrap_value=False) == 2


def test_rewards_of_tokens(ask: Ask) -> None:
    def rewards(**body: object) -> list[list[float]]:
        answer = ask(PATH, groups=GROUPS[:1], models=MODELS, want=["token_rewards", "reward"], **body)
        assert set(answer["weight_versions"]) == (
            {"reward"} if not body["kl_coef"] else {"policy", "reference", "reward"}
        )
        return [[one["reward"], *one["token_rewards"]] for one in answer["groups"][0]["completions"]]

    (whole, *tokens), (cut, *_) = rewards(kl_coef=0.0)
    assert tokens == [0.0, 0.0, 0.0, whole]
    with_end, without = rewards(kl_coef=0.0, missing_eos_penalty=1.5)
    assert with_end[-1] == pytest.approx(whole) and without[-1] == pytest.approx(cut - 1.5)
    clipped = rewards(kl_coef=0.0, reward_clip=1e-3)
    assert [abs(one[-1]) for one in clipped] == [1e-3, 1e-3] and clipped[0][0] == pytest.approx(whole)
    k2 = rewards(kl_coef=1.0, kl_estimator="k2")
    assert all(value <= 0 for value in k2[0][1:-1])


def test_a_judge_with_another_tokenizer(ask: Ask, text: Text, judge_text: Text) -> None:
    chat = [{"role": "user", "content": "What is 17 + 25?"}]
    ids = [*text.encode("The answer is 42.", False), EOS]
    body = {"models": {"reward": "judge"}, "want": ["reward"]}
    (group,) = ask(PATH, groups=[{"messages": chat, "completions": [{"token_ids": ids}]}], **body)["groups"]
    whole = [*chat, {"role": "assistant", "content": "The answer is 42."}]
    (alone,) = ask("/v1/rewards", model="judge", conversations=[whole])["data"]
    assert group["completions"][0]["tokens"] == "retokenized"
    assert group["completions"][0]["reward"] == pytest.approx(alone["reward"], abs=1e-3)
    beside = {"prompt_token_ids": text.render(chat), "messages": chat, "completions": [{"token_ids": ids}]}
    assert ask(PATH, groups=[beside], **body)["groups"][0]["completions"][0]["reward"] == pytest.approx(
        alone["reward"], abs=1e-3
    )


ONE: dict[str, Any] = {"groups": GROUPS[:1], "want": ["reward"], "models": MODELS}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"want": []}, "want", "name what"),
        ({"want": ["logits"]}, "want[0]", "policy_logprobs"),
        ({"models": {}}, "models.reward", "name one of reward, judge"),
        ({"models": {"reward": "policy"}}, "models.reward", "policy model"),
        ({"want": ["values"], "models": {"value": "reward"}}, "models.value", "reward model"),
        ({"want": ["token_rewards"]}, "kl_coef", "missing"),
        ({"want": ["token_rewards"], "kl_coef": 0, "models": {"reward": "judge"}}, "want", "different tokenizers"),
        ({"models": {"policy": "policy"}, "model": "sft"}, "model", "name one policy"),
        ({"groups": []}, "groups", "at least 1"),
        ({"groups": [{"completions": [{"token_ids": [5]}]}]}, "groups[0].prompt", "groups[0] must hold one"),
        (
            {"groups": [{"prompt_token_ids": [5], "completions": [{"token_ids": [320]}]}]},
            "groups[0].completions[0].token_ids",
            "token id 320",
        ),
        (
            {"groups": [{"prompt_token_ids": [5] * 500, "completions": [{"token_ids": [5] * 13}]}]},
            "groups[0].completions[0].token_ids",
            "takes 512 together",
        ),
        ({"groups": [{"prompt": "a", "completions": [{}]}]}, "groups[0].completions[0].token_ids", "missing"),
        ({"reward_clip": [1, -1]}, "reward_clip", "below its highest"),
        ({"reward_clip": 0}, "reward_clip", "below its highest"),
        ({"reward_clip": 10**400}, "reward_clip", "a number above 0"),
        ({"reward_clip": [1e300, 1e301]}, "reward_clip", "up to 1e+30"),
        ({"kl_coef": 1e308}, "kl_coef", "at most 1000"),
        ({"missing_eos_penalty": 1e308}, "missing_eos_penalty", "at most 1e+30"),
        ({"temperature": 0}, "temperature", "at least 1e-05"),
        ({"temperature": 9e-6}, "temperature", "at least 1e-05"),
        ({"kl_estimator": "k4"}, "kl_estimator", "k1"),
        (
            {
                "models": {"reward": "judge"},
                "groups": [{"prompt_token_ids": [1, 3, 70], "completions": [{"token_ids": [5]}]}],
            },
            "groups[0].prompt_token_ids",
            "as messages, too",
        ),
    ],
)
def test_refusals(http: httpx.Client, change: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {**ONE, **change}, param, words)


def test_a_model_that_is_not_hosted(http: httpx.Client) -> None:
    refused(http, PATH, {**ONE, "models": {"reward": "no"}}, "models.reward", "not hosted here", 404)
