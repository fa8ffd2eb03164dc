"""What the engine must know of a checkpoint's tokenizer, read from its files without the library that runs it."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

# Where there is no tokenizer.json: what such a file is made from.
SOURCES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json")
DECIDING = ("normalizer", "pre_tokenizer", "added_tokens")  # parts of tokenizer.json, beside the model


def fingerprint(directory: Path) -> str:
    """Of what makes token ids of text, so that equal ones give the same ids; "" where there is no tokenizer.

    Not of how tokenizer.json is laid out, nor of what it puts around a text, cuts off, pads or decodes.
    """
    state = blake2b(digest_size=16)
    whole = read_object(directory / "tokenizer.json")
    if not whole:
        files = [file for name in SOURCES if (file := directory / name).is_file()]
        for file in files:
            state.update(file.read_bytes())
        return state.hexdigest() if files else ""
    found = whole.get("model")
    model = dict(cast("dict[str, Any]", found)) if isinstance(found, dict) else {}
    vocabulary, merges = model.pop("vocab", None), model.pop("merges", None)
    if isinstance(vocabulary, dict):
        ids = cast("dict[str, int]", vocabulary)
        vocabulary = [f"{ids[token]} {token}" for token in sorted(ids, key=ids.__getitem__)]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in cast("list[Any]", merges or [])]
    rest = {name: whole.get(name) for name in DECIDING}
    for part in (vocabulary, pairs, model, rest):
        state.update(json.dumps(part, sort_keys=True).encode())
    return state.hexdigest()


def tokenizer_end_ids(directory: Path) -> set[int]:
    """The id of the tokenizer's own end-of-text token, where its configuration names one and its files know it."""
    config = read_object(directory / "tokenizer_config.json")
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = cast("dict[str, Any]", token).get("content")
    if not isinstance(token, str):
        return set()
    listed = config.get("added_tokens_decoder")
    if ids := {int(number) for number, entry in _entries(listed) if entry.get("content") == token}:
        return ids
    whole = read_object(directory / "tokenizer.json")
    added = enumerate(cast("list[Any]", whole.get("added_tokens") or []))
    if ids := {int(entry["id"]) for _, entry in _entries(dict(added)) if entry.get("content") == token}:
        return ids
    model: dict[str, Any] = whole.get("model") or {}
    vocabulary = model.get("vocab")  # SentencePiece's Unigram has a list there; its special tokens are listed as added
    number = cast("dict[str, int]", vocabulary).get(token) if isinstance(vocabulary, dict) else None
    return set() if number is None else {number}


def _entries(listed: object) -> list[tuple[Any, dict[str, Any]]]:
    """The pairs whose value is an object; what else stands there is the tokenizer's own loader to refuse."""
    pairs = cast("dict[Any, Any]", listed).items() if isinstance(listed, dict) else ()
    return [(key, cast("dict[str, Any]", value)) for key, value in pairs if isinstance(value, dict)]


def read_object(path: Path) -> dict[str, Any]:
    """Empty where the file is missing or broken: the tokenizer's own loader says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}
