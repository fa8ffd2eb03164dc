"""POST /v1/rlhf/normalize: demonstrations score 0 on average from then on, where a request asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean, pstdev
from typing import Any

import httpx
import pytest
from asking import refused

PATH = "/v1/rlhf/normalize"
TEXTS = ["The cat sat on the mat.", "a", "猫坐在垫子上", "One, two, three"]
DEMONSTRATIONS = [
    {"prompt": text[:1], "completion": {"text": text[1:]}} if text[1:] else {"prompt": text} for text in TEXTS
]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def afterwards(http: httpx.Client) -> Iterator[None]:
    yield
    http.post(PATH, json={"model": "reward", "mode": "none"})


def rewards(ask: Ask, **body: object) -> list[dict[str, float]]:
    return ask("/v1/rewards", model="reward", input=TEXTS, **body)["data"]


@pytest.mark.parametrize("mode", ["bias", "mean_std"])
def test_demonstrations_score_zero_on_average(ask: Ask, http: httpx.Client, mode: str) -> None:
    raw = [entry["reward"] for entry in rewards(ask)]
    answer = ask(PATH, model="reward", demonstrations=DEMONSTRATIONS, mode=mode)
    std = pstdev(raw) if mode == "mean_std" else 1.0
    assert answer["mean"] == -answer["bias"] == pytest.approx(fmean(raw), abs=1e-5) and answer["n"] == len(TEXTS)
    assert answer["std"] == pytest.approx(std, abs=1e-5)
    entries = rewards(ask, normalize=True)
    assert fmean(entry["reward"] for entry in entries) == pytest.approx(0, abs=1e-4)
    assert [entry["raw_reward"] for entry in entries] == pytest.approx(raw, abs=1e-5)
    assert [entry["reward"] for entry in rewards(ask)] == pytest.approx(raw, abs=1e-5)  # raw unless asked
    shown = http.get(PATH, params={"model": "reward"}).json()
    assert shown == {"model": "reward", "mode": mode, **{name: answer[name] for name in ("bias", "mean", "std")}}
    card = http.get("/v1/models/reward").json()
    assert (card["reward_mean"], card["reward_std"], card["reward_normalization"]) == (
        answer["mean"],
        answer["std"],
        mode,
    )
    group = ask("/v1/rlhf/score_group", model="reward", prompt="a", completions=[{"text": "b"}], normalize=True)
    assert group["scores"][0] == pytest.approx((group["raw_scores"][0] - answer["mean"]) / std, abs=1e-4)
    body = {"groups": [{"prompt": "a", "completions": [{"token_ids": [70]}]}], "models": {"reward": "reward"}}
    (one,) = ask("/v1/rlhf/evaluate", want=["reward"], normalize=True, **body)["groups"][0]["completions"]
    assert one["reward"] == pytest.approx((one["raw_reward"] - answer["mean"]) / std, abs=1e-4)


def test_without_persist_nothing_changes(ask: Ask, http: httpx.Client) -> None:
    answer = ask(PATH, model="reward", demonstrations=DEMONSTRATIONS, persist=False)
    assert answer["mean"] != 0 and not answer["persisted"]
    forgotten = http.get(PATH, params={"model": "reward"})
    assert forgotten.json()["mode"] == "none" and "-0" not in forgotten.text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "demonstrations", "empty"),
        ({"demonstrations": DEMONSTRATIONS[:1], "mode": "mean_std"}, "demonstrations", "nothing to scale by"),
        ({"demonstrations": DEMONSTRATIONS, "mode": "none"}, "demonstrations", "takes no demonstrations"),
        ({"demonstrations": [{}]}, "demonstrations[0].prompt", "must hold one of"),
        ({"demonstrations": [{"prompt": "a" * 4000}]}, "demonstrations[0]", "takes 512 together"),
        ({"model": None, "demonstrations": DEMONSTRATIONS}, "model", "name one of reward, judge"),
        ({"model": "policy", "demonstrations": DEMONSTRATIONS}, "model", "policy model"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    refused(http, PATH, {"model": "reward", **body}, param, words)
