"""Encoding equals transformers' AutoTokenizer, except that BOS is never there twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vocabularies

from tandem.server.text.text import Text, TextError

TEXTS = [
    "",
    " ",
    "hello world",
    "Hello 你好 🙂 naïve",
    "  two  spaces\n\n\tand a tab ",
    "<|im_start|>user\nhi<|im_end|>",
    "a</s>b <|endoftext|> c",
    "é e\u0301 ﬁ \u200d",
    "\x00\x7f ﷽ \U0010ffff",
    "<think>hm</think>",
    "x" * 500,
    "a</s>b 你好 " * 200,  # long enough for the call that lets other threads run
]
FILES = {**vocabularies.KINDS, "gpt2 files": vocabularies.gpt2_files}
DEMO = Path(__file__).parents[2] / "model" / "demo" / "policy"
if DEMO.exists():
    FILES["demo"] = lambda _: DEMO


@pytest.fixture(scope="module", params=FILES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FILES[request.param](tmp_path_factory.mktemp("checkpoint"))


def test_same_ids_texts_and_end_as_transformers(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoint)
    text = Text.load(checkpoint)
    for sample in TEXTS:
        for special in (True, False):
            assert text.encode(sample, special) == reference.encode(sample, add_special_tokens=special), sample
        ids = text.encode(sample)
        for skip in (True, False):
            assert text.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), sample
    assert text.end_ids == (reference.eos_token_id,)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {
            "bos_token": "<s>",
            "eos_token": {"content": "<pad>", "special": True, "__type": "AddedToken"},
            "pad_token": "<pad>",
        },
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"},
        {"added_tokens_decoder": {"9999": {"content": "<new>", "special": False, "normalized": False}}},
    ],
)
def test_tokenizer_config_is_read_as_transformers_reads_it(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    path = vocabularies.llama(tmp_path, **config)
    reference, text = AutoTokenizer.from_pretrained(path), Text.load(path)
    for sample in ("hello <new> world", "a<pad>b"):
        assert text.encode(sample) == reference.encode(sample)
    assert text.end_ids == (reference.eos_token_id,)
    assert {name: text.tokens[name] for name in reference.special_tokens_map} == reference.special_tokens_map


def test_bos_exactly_once(tmp_path: Path) -> None:
    text = Text.load(vocabularies.llama(tmp_path))
    for sample in ("hello", "<s>hello", "<s> hello"):
        ids = text.encode(sample)
        assert ids[0] == 1 and ids.count(1) == 1
    assert text.encode("hello", add_special_tokens=False)[0] != 1
    assert text.encode("<s><s>hello").count(1) == 2  # written twice: what the text says


def test_bos_of_the_post_processor_alone(tmp_path: Path) -> None:
    path = vocabularies.llama(tmp_path)
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert Text.load(path).encode("hello").count(1) == Text.load(path).encode("<s>hello").count(1) == 1


def test_bos_that_only_the_config_of_a_plain_vocabulary_asks_for(tmp_path: Path) -> None:
    path = vocabularies.gpt2_files(tmp_path)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}))
    text = Text.load(path)
    bos = text.token_id("<|endoftext|>")
    assert text.encode("hello") == [bos, *text.encode("hello", add_special_tokens=False)]
    assert text.encode("<|endoftext|>hello") == text.encode("hello")


def test_special_tokens_map_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    path = vocabularies.gpt2(tmp_path)
    (path / "tokenizer_config.json").write_text("{}")
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert Text.load(path).end_ids == (Text.load(path).token_id("<|endoftext|>"),)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    path = vocabularies.gpt2(tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    text = Text.load(path)
    assert text.decode(text.encode("hello there, quick brown fox")) == "hello there, quick brown fox"


@pytest.mark.parametrize("bad", ["a\ud800b", "\udfff", "\ud83d \ude00"])
def test_lone_surrogates_are_an_error(tmp_path: Path, bad: str) -> None:
    text = Text.load(vocabularies.gpt2(tmp_path))
    with pytest.raises(TextError, match="surrogate") as raised:
        text.encode(bad, param="prompt")
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["list"]])
def test_only_strings_are_text(tmp_path: Path, bad: Any) -> None:
    text = Text.load(vocabularies.gpt2(tmp_path))
    with pytest.raises(TextError, match="expected a string"):
        text.encode(bad)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_long_texts(tmp_path: Path, kind: str) -> None:
    text = Text.load(vocabularies.KINDS[kind](tmp_path))
    sample = "hello world, the quick brown fox. " * 6_000
    ids = text.encode(sample)
    assert text.decode(ids) == sample


def test_ids_that_are_no_tokens_decode_to_nothing(tmp_path: Path) -> None:
    for name, kind in vocabularies.KINDS.items():
        text = Text.load(kind(tmp_path / name))
        ids = text.encode("hello")
        assert text.decode([*ids, 100_000, -1, 1 << 40]) == "hello"
        assert text.token_bytes(100_000) == b"" and text.token_text(-1) == ""


def test_a_token_alone_keeps_its_space_and_its_bytes(tmp_path: Path) -> None:
    for name, kind in vocabularies.KINDS.items():
        text = Text.load(kind(tmp_path / name))
        ids = text.encode("the dog 🙂")
        pieces = [text.token_bytes(i) for i in ids if text.token_text(i) != "<s>"]
        assert b"".join(pieces).decode().lstrip() == "the dog 🙂"
        assert "\ufffd" in text.token_text(ids[-1])
        assert any(text.token_text(i).startswith(" d") for i in ids)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, r"has tokenizer.model but no tokenizer.json; .*save_pretrained"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Other"}'},
            "has vocab.json",
        ),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"vocab.json": "[]", "merges.txt": ""}, "cannot be read"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected an object"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message) as raised:
        Text.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_fingerprint_follows_tokenizer_and_template(tmp_path: Path) -> None:
    plain = Text.load(vocabularies.gpt2(tmp_path / "a")).fingerprint
    assert Text.load(vocabularies.gpt2(tmp_path / "b")).fingerprint == plain
    assert Text.load(vocabularies.gpt2(tmp_path / "c", chat_template="x")).fingerprint != plain
    assert Text.load(vocabularies.qwen(tmp_path / "d")).fingerprint != plain


def test_neither_torch_nor_transformers_is_imported() -> None:
    program = "import sys, tandem.server.text.text; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
