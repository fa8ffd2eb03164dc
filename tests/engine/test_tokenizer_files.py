"""Fingerprints of tokenizers: of what makes ids of text, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_tokenizer

from tandem.server.engine.tokenizer_files import fingerprint

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def rewrite(path: Path, change: Change, **layout: Any) -> str:
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content, **layout))
    return fingerprint(path)


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 999, "content": "<new>"})


def swap_two_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def write_merges_as_words(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(padding={"strategy": "BatchLongest"}, truncation={"max_length": 5}),
        lambda content: content.pop("decoder"),
        lambda content: content.pop("post_processor"),
        lambda content: content["model"].update(vocab=dict(sorted(content["model"]["vocab"].items()))),
        write_merges_as_words,
    ],
)
def test_layout_and_what_stands_around_a_text_do_not_count(path: Path, change: Change) -> None:
    assert fingerprint(path) == rewrite(path, change, indent=1) != ""


@pytest.mark.parametrize(
    "change",
    [
        add_token,
        swap_two_ids,
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["model"].update(ignore_merges=True),
    ],
)
def test_what_makes_other_ids_counts(path: Path, change: Change) -> None:
    assert fingerprint(path) != rewrite(path, change)


def test_files_that_a_tokenizer_is_made_from(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) == ""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b")
    one = fingerprint(tmp_path)
    (tmp_path / "merges.txt").write_text("b a")
    assert "" != one != fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')  # broken: its own loader says so
    assert fingerprint(tmp_path) not in ("", one)
