"""Prompts: lengths, seeds, files, and what is said of files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem.benchmarks.bench.datasets import DatasetError, Item, load
from tandem.benchmarks.bench.models import path_of, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(path_of("demo"))


def make(name: str, path: Path | None = None, **given: Any) -> list[Item]:
    return load(name, path, **{"count": 20, "input_len": 30, "output_len": 8, "vocab_size": 500} | given)


def length(tokenizer: Tokenizer, text: str | None) -> int:
    assert text is not None
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_random_ids_have_the_lengths_that_were_asked_for() -> None:
    items = make("random")
    assert {len(item.token_ids or ()) for item in items} == {30} and {item.output_len for item in items} == {8}
    assert all(3 <= token < 500 for item in items for token in item.token_ids or ())
    assert make("random") == items != make("random", seed=1)
    varied = make("random", count=400, range_ratio=0.5)
    assert {len(item.token_ids or ()) for item in varied} == set(range(15, 46))
    assert {item.output_len for item in varied} == set(range(4, 13))


def test_a_prefix_is_the_same_for_all_and_comes_on_top() -> None:
    items = [item.token_ids or [] for item in make("random", prefix_len=10)]
    assert {len(ids) for ids in items} == {40}
    assert len({tuple(ids[:10]) for ids in items}) == 1 and len({tuple(ids[10:]) for ids in items}) == 20


def test_random_text_encodes_to_its_ids(tokenizer: Tokenizer) -> None:
    items = make("random", tokenizer=tokenizer, input_len=64)
    for item in items:
        assert item.text is not None
        assert tokenizer.encode(item.text, add_special_tokens=False).ids == item.token_ids
        assert abs(len(item.token_ids or ()) - 64) <= 1
    assert sum(len(item.token_ids or ()) == 64 for item in items) >= 18


def test_chats_begin_alike(tokenizer: Tokenizer) -> None:
    items = make("chat", tokenizer=tokenizer, prefix_len=50, input_len=20)
    conversations = [item.messages or [] for item in items]
    assert all([message["role"] for message in talk] == ["system", "user"] for talk in conversations)
    assert len({talk[0]["content"] for talk in conversations}) == 1
    assert len({talk[1]["content"] for talk in conversations}) == 20
    assert 40 <= length(tokenizer, conversations[0][0]["content"]) <= 50
    assert all(14 <= length(tokenizer, talk[1]["content"]) <= 20 for talk in conversations)


def test_sharegpt_takes_the_first_two_turns_of_usable_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def talk(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    good = [talk(f"What is the capital of country {n}?", f"The capital is called {n}.", "Thanks!") for n in range(5)]
    bad = [
        talk("Only one turn of this conversation"),
        talk("Hi", "The answer is very long"),
        talk("word " * 3000, "no"),
    ]
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([*bad, *good]))
    items = make("sharegpt", file, count=5, tokenizer=tokenizer, output_len=None)
    assert {item.text for item in items} == {talk["conversations"][0]["value"] for talk in good}
    assert all(item.token_ids == tokenizer.encode(item.text or "").ids for item in items)
    answers = {len(tokenizer.encode(talk["conversations"][1]["value"]).ids) for talk in good}
    assert {item.output_len for item in items} == answers
    assert make("sharegpt", file, count=5, tokenizer=tokenizer, output_len=None, seed=1) != items
    assert {item.output_len for item in make("sharegpt", file, count=5, tokenizer=tokenizer, output_len=7)} == {7}
    with pytest.raises(DatasetError, match="has 5 usable entries, 6 were asked for"):
        make("sharegpt", file, count=6, tokenizer=tokenizer)


def test_lines_of_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hello"}]
    entries = [{"prompt": "Hello there", "output_len": 5}, {"token_ids": [7, 8]}, {"messages": messages}]
    file.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    first, second, third = make("jsonl", file, count=3, tokenizer=tokenizer, output_len=None)
    assert first == Item(tokenizer.encode("Hello there").ids, "Hello there", None, 5)
    assert second == Item([7, 8], None, None, 128)
    assert third == Item(None, None, messages, 128)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n{"prompt"', "line 2, is not JSON"),
        ('{"text": "a"}', 'line 1: "prompt" (text), "token_ids" or "messages" is needed'),
        ('{"prompt": "a", "output_len": 0}', '"output_len" is 0'),
        ("[1]", "line 1: an object is needed"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(DatasetError) as error:
        make("jsonl", file, count=1, output_len=None)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("books", {}, "one of random, sharegpt, jsonl, chat"),
        ("random", {"path": Path("x")}, "takes no file"),
        ("jsonl", {}, "needs a file: --dataset-path FILE"),
        ("jsonl", {"path": Path("missing.jsonl")}, "there is no such file"),
        ("random", {"range_ratio": 1.0}, "at least 0 and below 1"),
        ("random", {"vocab_size": None}, "a tokenizer or the size of the vocabulary"),
        ("random", {"count": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_made_is_said(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said.replace("(", r"\(")):
        make(name, **given)
