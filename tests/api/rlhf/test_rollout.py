"""POST /v1/rlhf/rollout: what is generated, and that its numbers are those of evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asking import refused
from servers import eventually

from tandem.server.text.text import Text

PATH = "/v1/rlhf/rollout"
PROMPTS = [[1, 70, 75, 80, 71], [1, 33, 40]]
EVERYTHING = ["ref_logprobs", "values", "reward", "kl", "token_rewards"]
BODY: dict[str, Any] = {
    "prompts": PROMPTS,
    "n": 3,
    "sampling": {"max_tokens": 12, "temperature": 0.8, "seed": 7},
    "models": {"reward": "reward"},
    "want": EVERYTHING,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
}
Ask = Callable[..., dict[str, Any]]


def events_of(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(PATH, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    *events, done = [event for event in answer.text.strip().split("\n\n") if not event.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def rollout(ask: Ask) -> dict[str, Any]:
    return ask(PATH, **BODY)


def test_its_numbers_are_those_of_evaluate(ask: Ask, rollout: dict[str, Any]) -> None:
    sequences = rollout["sequences"]
    assert [(one["prompt_index"], one["sample_index"]) for one in sequences] == [
        (p, s) for p in (0, 1) for s in range(3)
    ]
    assert rollout["prompt_token_ids"] == PROMPTS
    groups = [
        {
            "prompt_token_ids": prompt,
            "completions": [
                {name: one[name] for name in ("token_ids", "finish_reason")}
                for one in sequences
                if one["prompt_index"] == p
            ],
        }
        for p, prompt in enumerate(PROMPTS)
    ]
    common = {name: BODY[name] for name in ("models", "kl_coef", "missing_eos_penalty")}
    again = ask(
        PATH.replace("rollout", "evaluate"),
        groups=groups,
        temperature=0.8,
        want=["policy_logprobs", *EVERYTHING],
        **common,
    )
    found = [one for group in again["groups"] for one in group["completions"]]
    for sequence, evaluated in zip(sequences, found, strict=True):
        for name in ("policy_logprobs", "ref_logprobs", "values", "kl", "token_rewards"):
            assert sequence[name] == pytest.approx(evaluated[name], abs=1e-4), name
        assert sequence["reward"] == pytest.approx(evaluated["reward"], abs=1e-5)
        assert sequence["pooled_index"] == evaluated["pooled_index"]
        assert "sampling_logprobs" not in sequence
        assert sequence["weight_spans"] == [{"version": 0, "start": 0, "end": len(sequence["token_ids"])}]
        assert set(sequence["weight_versions"]) == {"policy", "reference", "reward", "value"}


def test_the_stream_says_the_same(http: httpx.Client, rollout: dict[str, Any]) -> None:
    begin, *sequences, end = events_of(http, BODY)
    assert begin["prompt_token_ids"] == PROMPTS and begin["models"] == rollout["models"]
    assert all(one.pop("object") == "rollout.sequence" for one in sequences)
    sequences.sort(key=lambda one: (one["prompt_index"], one["sample_index"]))
    for one, whole in zip(sequences, rollout["sequences"], strict=True):
        assert one["token_ids"] == whole["token_ids"] and one["text"] == whole["text"]
        assert one["token_rewards"] == pytest.approx(whole["token_rewards"], abs=1e-4)
    assert end["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in sequences)
    assert end["timing_ms"]["total"] > 0 and {"reference", "reward", "value"} < set(end["timing_ms"])


def test_short_sequences_are_told_while_long_ones_are_written(http: httpx.Client) -> None:
    greedy = {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "stop_token_ids": []}
    (first,) = events_of(http, {"prompts": [[1, 70]], "sampling": {**greedy, "max_tokens": 3}})[1:-1]
    greedy["stop_token_ids"] = [first["token_ids"][1]]  # ends one of them, and not soon the other
    body = {"prompts": [[1, 70], [1, 33, 40, 41]], "sampling": greedy, "want": ["values"], "stream": True}
    arrived: list[tuple[int, int]] = []
    with http.stream("POST", PATH, json=body) as answer:
        for line in answer.iter_lines():
            if '"rollout.sequence"' in line:
                one = json.loads(line.removeprefix("data: "))
                arrived.append((one["prompt_index"], len(one["token_ids"])))
    assert arrived[0] == (0, 2) and len(arrived) == 2


def test_texts_messages_and_a_judge(ask: Ask, text: Text) -> None:
    chat = [{"role": "user", "content": "Is it?"}]
    sampling = {"max_tokens": 6, "temperature": 0}
    answer = ask(PATH, messages=chat, sampling=sampling, want=["reward"], models={"reward": "judge"})
    assert answer["prompt_token_ids"] == [text.render(chat)]
    (one,) = answer["sequences"]
    assert one["tokens"] == "retokenized" and isinstance(one["reward"], float)
    assert len(one["policy_logprobs"]) == len(one["token_ids"])
    plain = ask(PATH, prompts=["The cat", "a"], sampling=sampling)
    assert plain["prompt_token_ids"] == [text.encode("The cat"), text.encode("a")]
    assert set(plain["models"]) == {"policy"} and "reward" not in plain["sequences"][0]


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 1.2}, {"logit_bias": {"70": 5}}],
)
def test_what_tokens_were_drawn_from_is_told_where_it_differs(ask: Ask, sampling: dict[str, Any]) -> None:
    drawn = {"max_tokens": 8, "seed": 3, "temperature": 0.9, **sampling}
    (one,) = ask(PATH, prompts=[[1, 70]], sampling=drawn)["sequences"]
    group = {"prompt_token_ids": [1, 70], "completions": [{"token_ids": one["token_ids"]}]}
    again = ask("/v1/rlhf/evaluate", groups=[group], want=["policy_logprobs"], temperature=0.9)
    assert one["policy_logprobs"] == pytest.approx(again["groups"][0]["completions"][0]["policy_logprobs"], abs=1e-4)
    assert one["sampling_logprobs"] != pytest.approx(one["policy_logprobs"], abs=1e-3)
    if "top_k" in sampling:
        assert all(a >= b - 1e-4 for a, b in zip(one["sampling_logprobs"], one["policy_logprobs"], strict=True))


def test_a_prompt_is_drawn_with_the_seed_plus_its_place(ask: Ask) -> None:
    def drawn(prompts: list[list[int]], seed: int) -> list[list[int]]:
        sampling = {"max_tokens": 8, "seed": seed}
        return [one["token_ids"] for one in ask(PATH, prompts=prompts, sampling=sampling)["sequences"]]

    first, second = drawn([[1, 70], [1, 70]], 3)
    assert first != second
    assert [first] == drawn([[1, 70]], 3) and [second] == drawn([[1, 70]], 4)


def test_a_sequence_that_cannot_be_judged_has_no_number(ask: Ask) -> None:
    """The critic's context is half as long as the policy's."""
    body = {
        "prompts": [[1, 70]],
        "sampling": {"max_tokens": 300, "ignore_eos": True},
        "want": ["values", "ref_logprobs"],
    }
    (one,) = ask(PATH, **body)["sequences"]
    assert one["values"] is None and one["ref_logprobs"] is None and len(one["policy_logprobs"]) == 300
    assert "256" in one["error"]["message"] and one["error"]["type"] == "invalid_request_error"


def test_greedy_log_probabilities_are_those_of_the_logits(ask: Ask) -> None:
    (one,) = ask(PATH, prompts=[[1, 70]], sampling={"max_tokens": 8, "temperature": 0})["sequences"]
    group = {"prompt_token_ids": [1, 70], "completions": [{"token_ids": one["token_ids"]}]}
    again = ask("/v1/rlhf/evaluate", groups=[group], want=["policy_logprobs"])
    assert one["policy_logprobs"] == pytest.approx(again["groups"][0]["completions"][0]["policy_logprobs"], abs=1e-4)
    assert "sampling_logprobs" not in one


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_frees_the_engine(http: httpx.Client, computed: Callable[[str], int], stream: bool) -> None:
    body = {"prompts": [[1, 70]] * 8, "n": 8, "sampling": {"max_tokens": 500, "ignore_eos": True}, "want": ["values"]}

    def load() -> list[int]:
        models = http.get("/server_info").json()["models"]
        return [model["now"][name] for model in models for name in ("running", "waiting")]

    before = computed("policy")
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATH, json={**body, "stream": stream}, timeout=0.3)
    eventually(lambda: not any(load()), 10)
    assert 0 < computed("policy") - before < 64 * 400


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompts": None}, "prompts", "either prompts or messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompts", "either prompts or messages"),
        ({"sampling": {"temperatur": 1}}, "sampling.temperatur", "did you mean 'temperature'"),
        ({"sampling": {"top_p": 2}}, "sampling.top_p", "at most 1"),
        ({"sampling": {"n": 2}}, "sampling.n", "unknown field"),
        ({"sampling": {"max_tokens": 600}}, "sampling.max_tokens", "holds 512"),
        ({"temperature": 1}, "temperature", "sampling.temperature"),
        ({"n": 0}, "n", "at least 1"),
        ({"models": {}}, "models.reward", "name one of"),
        (
            {"prompts": None, "messages": [[{"role": "user", "content": 5}]]},
            "messages[0][0].content",
            "must be a string",
        ),
        ({"prompts": [[320]]}, "prompts[0]", "token id 320"),
    ],
)
def test_refusals(http: httpx.Client, change: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {**BODY, **change}, param, words)
