"""Rewards in the words of vLLM, SGLang, verl, OpenRLHF, slime and LLaMA-Factory, against transformers."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from dialects import post

from tandem.server.text.text import Text

Score = Callable[[list[int]], float]
TEXTS = ["The cat sat on the mat.", "猫坐在垫子上", "One, two, three"]
TURNS = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]


@pytest.fixture
def scores(text: Text, hf_score: Score) -> list[float]:
    return [hf_score(text.encode(one)) for one in TEXTS]


def test_classify_is_raw_unless_told_otherwise(http: httpx.Client, text: Text, scores: list[float]) -> None:
    raw = post(http, "/classify", model="reward", input=TEXTS)
    assert raw["object"] == "list" and raw["id"].startswith("classify-") and raw["model"] == "reward"
    assert [entry["index"] for entry in raw["data"]] == [0, 1, 2]
    assert [entry["probs"] for entry in raw["data"]] == [[pytest.approx(score, abs=1e-4)] for score in scores]
    assert {(entry["label"], entry["num_classes"]) for entry in raw["data"]} == {("LABEL_0", 1)}
    assert raw["usage"]["prompt_tokens"] == sum(len(text.encode(one)) for one in TEXTS)
    verl = post(http, "/classify", model="reward", input=TEXTS[0], use_activation=False)
    assert verl["data"][-1]["probs"][-1] == pytest.approx(scores[0], abs=1e-4)
    squashed = post(http, "/classify", input=[text.encode(one) for one in TEXTS], use_activation=True)
    expected = [1 / (1 + math.exp(-score)) for score in scores]
    assert [entry["probs"][0] for entry in squashed["data"]] == pytest.approx(expected, abs=1e-5)


def test_bos_stands_there_once(http: httpx.Client, scores: list[float]) -> None:
    """verl takes it off the text, OpenRLHF leaves it there."""
    for written in (TEXTS[0], "<s>" + TEXTS[0]):
        found = post(http, "/classify", input=written)["data"][0]["probs"][0]
        assert found == pytest.approx(scores[0], abs=1e-4)
        assert post(http, "/get_reward", query=[written])["rewards"] == [pytest.approx(scores[0], abs=1e-4)]
    without = post(http, "/classify", input=TEXTS[0], add_special_tokens=False)["data"][0]["probs"][0]
    assert without != pytest.approx(scores[0], abs=1e-4)


def test_messages_are_rendered_without_an_open_turn(http: httpx.Client, text: Text, hf_score: Score) -> None:
    found = post(http, "/classify", messages=TURNS)["data"][0]["probs"][0]
    assert found == pytest.approx(hf_score(text.render(TURNS, add_generation_prompt=False)), abs=1e-4)
    again = post(http, "/rm", prompt=TURNS[:1], response="It is.")
    assert again == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_may_be_cut(http: httpx.Client, text: Text, hf_score: Score, side: str) -> None:
    ids = text.encode(TEXTS[0])
    kept = ids[-4:] if side == "left" else ids[:4]
    found = post(http, "/classify", input=ids, truncate_prompt_tokens=4, truncation_side=side)
    assert found["data"][0]["probs"][0] == pytest.approx(hf_score(kept), abs=1e-4)
    assert found["usage"]["prompt_tokens"] == 4


def test_the_same_path_in_sglangs_words(http: httpx.Client, text: Text, scores: list[float]) -> None:
    one = post(http, "/classify", text=TEXTS[0], rid="mine")
    assert one["embedding"] == [pytest.approx(scores[0], abs=1e-4)]
    assert one["meta_info"]["id"] == "mine" and one["meta_info"]["prompt_tokens"] == len(text.encode(TEXTS[0]))
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert one["meta_info"]["weight_version"] == "0"
    many = post(http, "/classify", input_ids=[text.encode(one) for one in TEXTS])
    assert [entry["embedding"][0] for entry in many] == pytest.approx(scores, abs=1e-4)
    assert len(post(http, "/classify", text=TEXTS[:1])) == 1  # a list, since one was sent


def test_pooling(http: httpx.Client, text: Text, scores: list[float]) -> None:
    rewards = post(http, "/pooling", model="reward", input=TEXTS)
    assert [entry["data"] for entry in rewards["data"]] == [[pytest.approx(score, abs=1e-4)] for score in scores]
    assert {entry["object"] for entry in rewards["data"]} == {"pooling"}
    packed = post(http, "/pooling", task="classify", input=TEXTS[0], encoding_format="base64")["data"][0]["data"]
    assert struct.unpack("<f", base64.b64decode(packed)) == (pytest.approx(scores[0], abs=1e-4),)
    vector = post(http, "/pooling", model="embed", input=TEXTS[0])["data"][0]["data"]
    plain = post(http, "/v1/embeddings", model="embed", input=TEXTS[0])["data"][0]["embedding"]
    assert vector == pytest.approx(plain, abs=1e-6) and math.hypot(*vector) == pytest.approx(1)
    raw = post(http, "/pooling", model="embed", input=TEXTS[0], use_activation=False)["data"][0]["data"]
    assert math.hypot(*raw) != pytest.approx(1)


def test_a_reward_model_answers_embeddings(http: httpx.Client, scores: list[float]) -> None:
    found = post(http, "/v1/embeddings", model="reward", input=TEXTS)["data"]
    assert [entry["embedding"][-1] for entry in found] == pytest.approx(scores, abs=1e-4)


def test_pairs_are_joined_as_transformers_does(http: httpx.Client, reward: Path, hf_score: Score) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward)
    expected = [hf_score(tokenizer("Where?", one)["input_ids"]) for one in TEXTS]
    for body in ({"text_1": "Where?", "text_2": TEXTS}, {"queries": ["Where?"] * 3, "documents": TEXTS}):
        for path in ("/score", "/v1/score"):
            found = post(http, path, model="reward", **body)
            assert [entry["score"] for entry in found["data"]] == pytest.approx(expected, abs=1e-4)
            assert [(entry["index"], entry["object"]) for entry in found["data"]] == [(i, "score") for i in range(3)]
    order = sorted(range(3), key=lambda index: -expected[index])
    for path in ("/rerank", "/v1/rerank"):
        found = post(http, path, model="reward", query="Where?", documents=TEXTS, top_n=2)
        assert [entry["index"] for entry in found["results"]] == order[:2]
        assert found["results"][0]["document"] == {"text": TEXTS[order[0]], "multi_modal": None}
        assert found["results"][0]["relevance_score"] == pytest.approx(max(expected), abs=1e-4)


def test_pairs_of_embeddings_are_compared_by_their_angle(http: httpx.Client) -> None:
    one, *others = (
        entry["embedding"] for entry in post(http, "/v1/embeddings", model="embed", input=["Where?", *TEXTS])["data"]
    )
    expected = [sum(a * b for a, b in zip(one, other, strict=True)) for other in others]
    found = post(http, "/score", model="embed", text_1="Where?", text_2=TEXTS)
    assert [entry["score"] for entry in found["data"]] == pytest.approx(expected, abs=1e-5)


def test_openrlhf(http: httpx.Client, scores: list[float]) -> None:
    found = post(http, "/get_reward?model=reward", query=TEXTS, prompts=["?"] * 3, labels=[None, 1, "x"])
    assert found["rewards"] == found["scores"] == pytest.approx(scores, abs=1e-4)
    assert found["extra_logs"] == {"raw_reward": found["rewards"]}


def test_slime_gets_a_bare_number(http: httpx.Client, scores: list[float]) -> None:
    found = post(http, "/rm", prompt=TEXTS[0][:8], response=TEXTS[0][8:], label="7")
    assert isinstance(found, float) and found == pytest.approx(scores[0], abs=1e-4)


def test_llama_factory_calls_every_model_model(http: httpx.Client, text: Text, hf_score: Score) -> None:
    found = post(http, "/v1/score/evaluation", model="model", messages=TEXTS, max_length=3)
    assert found["object"] == "score.evaluation" and found["model"] == "model"
    assert found["scores"] == pytest.approx([hf_score(text.encode(one)[:3]) for one in TEXTS], abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/classify", {"model": "policy", "input": "a"}, "model", "policy model"),
        ("/classify", {}, "input", "either input or messages"),
        ("/classify", {"input": "a", "messages": TURNS}, "input", "either input or messages"),
        ("/classify", {"input": "a", "text": "a"}, "text", "unknown field"),
        ("/classify", {"input": [5] * 600}, "input", "has 600 tokens"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ("/classify", {"text": "a", "input_ids": [5]}, "text", "either text"),
        ("/classify", {"text": ["a", "b"], "rid": ["x"]}, "rid", "must be 2"),
        ("/classify", {"input_ids": [320]}, "input_ids", "token id 320"),
        ("/pooling", {"model": "reward", "input": "a", "task": "token_classify"}, "task", "whose task is 'classify'"),
        ("/pooling", {"model": "policy", "input": "a"}, "model", "policy model"),
        ("/score", {"text_1": "a"}, "text_1", "send text_1 and text_2"),
        ("/score", {"text_1": "a", "documents": ["b"]}, "text_1", "not documents and text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_2", "may have 1 or as many"),
        ("/score", {"model": "policy", "text_1": "a", "text_2": "b"}, "model", "compares no texts"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "1 to 1024"),
        ("/v1/embeddings", {"model": "reward", "input": "a", "dimensions": 1}, "dimensions", "reward model"),
        ("/get_reward", {"query": []}, "query", "at least one"),
        ("/get_reward?model=policy", {"query": ["a"]}, "model", "policy model"),
        ("/get_reward?normalize=1", {"query": ["a"]}, "normalize", "true or false"),
        ("/rm", {"prompt": "a"}, "response", "missing"),
        ("/rm", {"prompt": "a " * 600, "response": "b"}, "prompt", "tokens"),
        ("/v1/score/evaluation", {"model": "judge", "messages": ["a"]}, "model", "not hosted"),
    ],
)
def test_what_cannot_be_scored_is_no_number(http: httpx.Client, path: str, body: dict, param: str, words: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert (error["param"] or "").split("[")[0] == param and words in error["message"], error
