"""What quality is measured on: conversations with answers, or plain text, as token ids of a model.

A file is plain text, or lines of JSON (`.jsonl`): `{"messages": […], "tools": […], "answers": […]}`, the best answer
first, as the bundled set has them, or `{"text": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...server.engine.options import DEMO
from ...server.text.text import Text
from ..bench.models import UsageError

BUNDLED = DEMO / "held_out.jsonl"  # made by examples/rlhf/held_out.py
WINDOW = 1024  # tokens of plain text that are read at once
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt with answers, or, without messages, one plain text in `answers`."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """Token ids, of which those from `first` on are measured; at least 1, for nothing predicts the first token."""

    token_ids: list[int]
    first: int = 1


class Tokens(Protocol):
    """How one model makes token ids."""

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: Sequence[Message], tools: Sequence[Message], opens: bool) -> list[int]:
        """A conversation by the chat template; `opens`: ready for the next answer."""
        ...


class LocalTokens:
    """By the tokenizer files of a checkpoint."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def render(self, messages: Sequence[Message], tools: Sequence[Message], opens: bool) -> list[int]:
        return self._text.render(messages, tools or None, add_generation_prompt=opens)


def read_examples(path: Path | None) -> list[Example]:
    """None: the bundled set. Raises UsageError."""
    file = path or BUNDLED
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--text {file}: it cannot be read as text: {error}") from None
    if file.suffix != ".jsonl":
        if not text.strip():
            raise UsageError(f"--text {file}: it is empty")
        return [Example((), (), (text,))]
    found = [_example(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise UsageError(f"--text {file}: it has no lines")
    return found


def passages(examples: Sequence[Example], tokens: Tokens, context: int) -> list[Passage]:
    """For language models: the best answer behind its prompt, plain text in windows. Raises UsageError where none is
    left within `context` tokens."""
    found = list(_passages(examples, tokens, context))
    if not found:
        raise UsageError(f"--text: it has no two tokens in a row to measure within a context of {context}")
    return found


def _passages(examples: Sequence[Example], tokens: Tokens, context: int) -> Iterator[Passage]:
    for example in examples:
        if example.messages:
            prompt = tokens.render(example.messages, example.tools, True)
            whole = _answered(example, example.answers[0], tokens)[:context]
            if len(whole) > (first := _common(prompt, whole)):
                yield Passage(whole, max(first, 1))
        else:
            ids, size = tokens.encode(example.answers[0]), min(WINDOW, context)
            for begin in range(0, len(ids) - 1, size - 1):  # a window begins with the last token of the one before
                yield Passage(ids[begin : begin + size])


def rankings(examples: Sequence[Example], tokens: Tokens, context: int) -> list[list[list[int]]]:
    """For reward models: the texts of each prompt, to be compared with each other. Raises UsageError."""
    groups = [
        [ids for answer in example.answers if len(ids := _answered(example, answer, tokens)) <= context]
        for example in examples
        if example.messages
    ]
    plain = [ids for one in examples if not one.messages for ids in [tokens.encode(one.answers[0])] if ids]
    groups += [[ids for ids in plain if len(ids) <= context]]
    found = [group for group in groups if len(group) > 1]
    if not found:
        raise UsageError("--text: a reward model is measured on texts that it can compare; give several, as .jsonl")
    return found


def _example(file: Path, number: int, line: str) -> Example:
    try:
        fields = json.loads(line)
        if "text" in fields:
            return Example((), (), (str(fields["text"]),))
        messages, answers = tuple(fields["messages"]), tuple(map(str, fields["answers"]))
        if messages and answers:
            return Example(messages, tuple(fields.get("tools", ())), answers)
    except (ValueError, TypeError, KeyError):
        pass
    raise UsageError(f'--text {file}, line {number}: {{"messages": […], "answers": […]}} or {{"text": …}} is needed')


def _answered(example: Example, answer: str, tokens: Tokens) -> list[int]:
    return tokens.render([*example.messages, {"role": "assistant", "content": answer}], example.tools, False)


def _common(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many first tokens they share."""
    pairs = zip(prompt, whole, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
