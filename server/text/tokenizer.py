"""A checkpoint's tokenizer files -> a `tokenizers.Tokenizer` that encodes as transformers' AutoTokenizer does.

transformers itself is not imported: that costs seconds in every API worker.
"""

# pyright: reportUnknownMemberType=false
# tokenizers' stubs leave some parameters open

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from .errors import TextError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What transformers' tokenizer classes assume where tokenizer_config.json is silent.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2": {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2": {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")},
    "Bloom": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
# Which of them transformers takes where tokenizer_config.json names none.
CLASS_OF_MODEL = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen2", "bloom": "Bloom"}


@dataclass(frozen=True)
class LoadedTokenizer:
    tokenizer: Tokenizer
    config: Mapping[str, Any]  # tokenizer_config.json
    tokens: Mapping[str, str]  # bos_token, eos_token, … that the checkpoint names
    bos_id: int | None
    adds_bos: bool  # whether encoding with special tokens starts with bos_id
    digest: str  # of the files that were read


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """Raises `TextError` when there is no tokenizer we can read."""
    config = read_json(path / "tokenizer_config.json")
    kind = class_name(config) or CLASS_OF_MODEL.get(str(read_json(path / "config.json").get("model_type")), "")
    tokenizer = read_tokenizer(path, kind)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = named_tokens(CLASS_TOKENS.get(kind, {}), read_json(path / "special_tokens_map.json"), config)
    add_missing_tokens(tokenizer, config, tokens)
    if not (path / "tokenizer.json").is_file():  # a tokenizer.json says itself what it adds, and is believed
        set_post_processor(tokenizer, config, tokens)
    bos = tokens.get("bos_token")
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    adds_bos = bos_id is not None and tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    return LoadedTokenizer(tokenizer, config, tokens, bos_id, adds_bos, digest_of(path))


def read_json(file: Path) -> dict[str, Any]:
    """{} where the file is missing."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TextError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TextError(f"{file}: expected an object")
    return cast("dict[str, Any]", value)


def class_name(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")


def read_tokenizer(path: Path, kind: str) -> Tokenizer:
    file = path / "tokenizer.json"
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if vocabulary.is_file() and merges.is_file() and kind in ("", "GPT2"):
            tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return tokenizer
    except Exception as error:  # the library raises plain Exception
        raise TextError(f"{path}: the tokenizer cannot be read: {error}") from None
    present = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (path / name).is_file()]
    if present:
        raise TextError(
            f"{path}: has {present[0]} but no tokenizer.json; write one once with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        )
    raise TextError(f"{path}: no tokenizer.json (nor vocab.json with merges.txt)")


def content_of(token: object) -> str | None:
    """A token is written as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = cast("dict[str, object]", token).get("content")
    return token if isinstance(token, str) else None


def named_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Later sources win; null means none."""
    found: dict[str, object] = {}
    for source in sources:
        found |= {name: source[name] for name in NAMED if name in source}
        extra = source.get("extra_special_tokens")
        if isinstance(extra, dict):  # named ones of the model's own, such as image_token
            found |= cast("dict[str, object]", extra)
    contents = {name: content_of(token) for name, token in found.items()}
    return {name: content for name, content in contents.items() if content is not None}


def add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
    """Added tokens that only tokenizer_config.json knows, and the special mark of the named ones."""
    listed = cast("dict[str, dict[str, Any]]", config.get("added_tokens_decoder") or {})
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        if content not in known:
            known[content] = AddedToken(content, **{flag: entry[flag] for flag in flags if flag in entry})
            tokenizer.add_tokens([known[content]])
    more: list[object] = [*tokens.values()]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(name), list):
            more += config[name]
    for token in more:
        content = content_of(token)
        if content and not (content in known and known[content].special):
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def set_post_processor(tokenizer: Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
    """What tokenizer_config.json's `add_bos_token` and `add_eos_token` ask for."""
    bos = tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = tokens.get("eos_token") if config.get("add_eos_token") else None
    single = [token for token in (bos, "$A", eos) if token is not None]
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)  # pyright: ignore[reportArgumentType, reportCallIssue]


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        file = path / name
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()
