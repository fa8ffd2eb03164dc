"""What is asked: prompts with the number of tokens that each answer shall have.

`random`    token ids, or words where a tokenizer is given, of chosen lengths
`sharegpt`  a file of ShareGPT conversations: the first two turns of each
`jsonl`     a file with one object per line: "prompt" (text), "token_ids" or "messages", and optionally "output_len"
`chat`      generated conversations behind one common system message

The same seed gives the same items on any machine. Nothing is repeated to make up the number that was asked for:
a prompt that comes twice is answered from the prefix cache.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = ("random", "sharegpt", "jsonl", "chat")
OUTPUT_LEN = 128  # where neither the file nor the user says
SHAREGPT_LEAST, SHAREGPT_PROMPT, SHAREGPT_TOTAL = 4, 1024, 2048  # tokens; vLLM's bounds of a usable conversation
TRIES = 8  # to find a text that encodes to a given number of tokens
SPACES = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write a space
ENOUGH = 100  # words to draw from
FIRST_ID = 3  # ids below are special in most vocabularies
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend
"""


class DatasetError(ValueError):
    """What was asked for cannot be made. The message says what is wrong and what would do."""


@dataclass(frozen=True)
class Item:
    """One request. At least one of the first three is set; token ids and text say the same where both are."""

    token_ids: list[int] | None
    text: str | None
    messages: list[dict[str, Any]] | None
    output_len: int


def load(
    name: str,
    path: Path | None,
    *,
    count: int,
    input_len: int,
    output_len: int | None,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> list[Item]:
    """`count` items. Raises DatasetError.

    Lengths of `random` and `chat` are uniform in [length · (1 - range_ratio), length · (1 + range_ratio)], at least 1;
    `prefix_len` tokens, the same for all, come before the `input_len`. `output_len` None: what the file says, else 128.
    """
    if name not in NAMES:
        raise DatasetError(f"--dataset-name {name}: one of {', '.join(NAMES)}")
    if count < 1 or input_len < 1 or (output_len is not None and output_len < 1) or prefix_len < 0:
        raise DatasetError("the number of prompts and their lengths are at least 1, and a common prefix at least 0")
    if not 0 <= range_ratio < 1:
        raise DatasetError(f"--range-ratio {range_ratio}: at least 0 and below 1")
    if (path is None) != (name in ("random", "chat")):
        needs = "takes no file" if path is not None else "needs a file: --dataset-path FILE"
        raise DatasetError(f"--dataset-name {name} {needs}")
    if path is not None:
        if not path.is_file():
            raise DatasetError(f"--dataset-path {path}: there is no such file")
        reader = _sharegpt if name == "sharegpt" else _jsonl
        items = list(reader(path, tokenizer, output_len, random.Random(seed)))
        if len(items) < count:
            raise DatasetError(f"{path} has {len(items)} usable entries, {count} were asked for: ask for fewer")
        return items[:count]
    lengths = _Lengths(input_len, output_len or OUTPUT_LEN, range_ratio, seed)
    make = _random if name == "random" else _chat
    return make(count, lengths, prefix_len, seed, tokenizer, vocab_size)


class _Lengths:
    """Tokens of each prompt and answer, drawn in order."""

    def __init__(self, given: int, wanted: int, ratio: float, seed: int) -> None:
        self._given, self._wanted = self._bounds(given, ratio), self._bounds(wanted, ratio)
        self._draw = random.Random(seed)

    @staticmethod
    def _bounds(length: int, ratio: float) -> tuple[int, int]:
        return max(1, int(length * (1 - ratio))), int(length * (1 + ratio))

    def next(self) -> tuple[int, int]:
        return self._draw.randint(*self._given), self._draw.randint(*self._wanted)


def _random(
    count: int, lengths: _Lengths, prefix_len: int, seed: int, tokenizer: Tokenizer | None, vocab_size: int | None
) -> list[Item]:
    draw = random.Random(f"tokens {seed}")
    known = ids_to_draw_from(tokenizer, vocab_size)
    prefix = draw.choices(known, k=prefix_len)
    items: list[Item] = []
    for _ in range(count):
        given, wanted = lengths.next()
        ids = prefix + draw.choices(known, k=given)
        if tokenizer is None:
            items.append(Item(ids, None, None, wanted))
        else:
            ids, text = as_text(tokenizer, ids, known, draw)
            items.append(Item(ids, text, None, wanted))
    return items


def ids_to_draw_from(tokenizer: Tokenizer | None, vocab_size: int | None) -> Sequence[int]:
    """Ordinary tokens of the vocabulary; where there are enough of them, those that are a space and letters: as text,
    such tokens keep their borders. Raises DatasetError where nothing says how large the vocabulary is."""
    if tokenizer is None:
        if vocab_size is None or vocab_size <= FIRST_ID:
            raise DatasetError("random prompts need a tokenizer or the size of the vocabulary")
        return range(FIRST_ID, vocab_size)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number not in special)
    words = [
        number for number, token in vocabulary if token[:1] in SPACES and token[1:].isascii() and token[1:].isalpha()
    ]
    return words if len(words) >= ENOUGH else [number for number, _ in vocabulary]


def as_text(tokenizer: Tokenizer, ids: list[int], known: Sequence[int], draw: random.Random) -> tuple[list[int], str]:
    """A text that begins like these ids and encodes to as many; where none is found, one that nearly does.

    Neighbours may merge when text is encoded again: what is missing is drawn anew, what is too much cut off.
    """
    wanted = len(ids)
    text, found = "", ids
    for _ in range(TRIES):
        text = tokenizer.decode(found, skip_special_tokens=False)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if len(found) == wanted:
            break
        found = found[:wanted] + draw.choices(known, k=max(0, wanted - len(found)))
    else:
        text = tokenizer.decode(found, skip_special_tokens=False)
        found = tokenizer.encode(text, add_special_tokens=False).ids
    return found, text


def _chat(
    count: int, lengths: _Lengths, prefix_len: int, seed: int, tokenizer: Tokenizer | None, vocab_size: int | None
) -> list[Item]:
    """A system message of `prefix_len` tokens, the same for all, and a question of everyday words to each."""
    draw = random.Random(f"words {seed}")
    system = _sentence(prefix_len, draw, tokenizer) if prefix_len else "You are a helpful assistant."
    items: list[Item] = []
    for _ in range(count):
        given, wanted = lengths.next()
        question = {"role": "user", "content": _sentence(given, draw, tokenizer)}
        items.append(Item(None, None, [{"role": "system", "content": system}, question], wanted))
    return items


def _sentence(tokens: int, draw: random.Random, tokenizer: Tokenizer | None) -> str:
    """As many words as make that many tokens, or, without a tokenizer, that many words."""
    words = draw.choices(WORDS.split(), k=tokens)
    if tokenizer is not None:
        while len(words) > 1 and len(tokenizer.encode(" ".join(words), add_special_tokens=False).ids) > tokens:
            excess = len(tokenizer.encode(" ".join(words), add_special_tokens=False).ids) / tokens
            words = words[: max(1, min(len(words) - 1, int(len(words) / excess)))]
    return " ".join(words)


def _sharegpt(path: Path, tokenizer: Tokenizer | None, output_len: int | None, draw: random.Random) -> Iterator[Item]:
    """In drawn order, without what is too short or too long to be a fair load, by vLLM's bounds."""
    if tokenizer is None:
        raise DatasetError("--dataset-name sharegpt needs a tokenizer: give a model with a tokenizer.json")
    try:
        whole = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(whole, list):
        raise DatasetError(f"{path}: a list of conversations is needed")
    talks = [talk for entry in whole if isinstance(entry, dict) and (talk := _turns(entry)) is not None]
    draw.shuffle(talks)
    for prompt, answer in talks:
        ids = tokenizer.encode(prompt).ids
        wanted = len(tokenizer.encode(answer).ids) if output_len is None else output_len
        if min(len(ids), wanted) < SHAREGPT_LEAST or len(ids) > SHAREGPT_PROMPT or len(ids) + wanted > SHAREGPT_TOTAL:
            continue
        yield Item(ids, prompt, None, wanted)


def _turns(entry: dict[str, Any]) -> tuple[str, str] | None:
    """The first two turns; None where there are fewer."""
    turns = entry.get("conversations", entry.get("conversation"))
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    return (texts[0], texts[1]) if isinstance(texts[0], str) and isinstance(texts[1], str) else None


def _jsonl(path: Path, tokenizer: Tokenizer | None, output_len: int | None, draw: random.Random) -> Iterator[Item]:
    """In the file's order."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DatasetError(f"{path}, line {number}: an object is needed")
        ids, text, messages = entry.get("token_ids"), entry.get("prompt"), entry.get("messages")
        if not (_is_list_of(ids, int) or isinstance(text, str) or _is_list_of(messages, dict)):
            raise DatasetError(f'{path}, line {number}: "prompt" (text), "token_ids" or "messages" is needed')
        if ids is None and isinstance(text, str) and tokenizer is not None:
            ids = tokenizer.encode(text).ids
        said = entry.get("output_len", entry.get("output_tokens", OUTPUT_LEN))
        wanted = said if output_len is None else output_len
        if not isinstance(wanted, int) or wanted < 1:
            raise DatasetError(f'{path}, line {number}: "output_len" is {wanted!r}: a whole number, at least 1')
        yield Item(ids, text, messages, wanted)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, kind) for one in value)
