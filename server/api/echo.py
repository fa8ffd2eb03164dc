"""The prompt as it stands before an answer that echoes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..text.text import Text
from .protocol import Prompt


@dataclass(frozen=True, slots=True)
class Echo:
    text: str
    offsets: Sequence[int]  # where in the text each of the prompt's tokens starts


def echo_of(text: Text, prompt: Prompt, ids: Sequence[int], whole: bool, skip_special_tokens: bool) -> Echo:
    """A text is echoed as it was sent, token ids as they are decoded; so is a text of which only the end was kept
    (`whole` false). What a tokenizer put before a text has no room there: it starts where the text does."""
    if not whole or not isinstance(prompt, str):
        return _decoded(text, ids, skip_special_tokens)
    # Special tokens are skipped where they came from the tokenizer, and not where the text itself spells them.
    for skip in (True, False):
        decoded = _decoded(text, ids, skip)
        if decoded.text.endswith(prompt):
            before = len(decoded.text) - len(prompt)
            return Echo(prompt, [max(0, offset - before) for offset in decoded.offsets])
    return Echo(prompt, [min(offset, len(prompt)) for offset in _decoded(text, ids, True).offsets])


def _decoded(text: Text, ids: Sequence[int], skip_special_tokens: bool) -> Echo:
    """A character that the last tokens leave open is left to the answer, which may complete it."""
    piece = text.detokenizer(skip_special_tokens=skip_special_tokens, offsets=True).push(ids)
    return Echo(piece.text, piece.offsets)
