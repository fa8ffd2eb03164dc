"""Sequences in one model's tokens, as a model with another tokenizer and chat template reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...engine.request import ModelCard
from ...text.text import Text
from ..errors import invalid
from .prompts import Answer, Reader, Shared, Source, shared


@dataclass(frozen=True, slots=True)
class Translation:
    """From the tokens of `card`, the model that wrote the sequences, to those of `reader`'s."""

    card: ModelCard
    text: Text
    reader: Reader

    def source(self, source: Source) -> Source:
        """Without token ids: messages or a text as they are, ids alone as the text they stand for.

        Raises ApiError where that text would not say all: the ids have special tokens inside, such as ends of turns.
        """
        if source.ids is None or source.messages is not None or source.text is not None:
            return replace(source, ids=None)
        begins = self.text.token_id(self.text.tokens.get("bos_token", "")) == source.ids[0]
        ids = source.ids[1:] if begins else source.ids
        if not set(self.text.special_ids).isdisjoint(ids):
            raise invalid(
                f"{source.path('prompt_token_ids')} has special tokens of {self.card.name!r}, and "
                f"{self.reader.card.name!r} has another tokenizer: send the prompt as messages, too",
                source.path("prompt_token_ids"),
            )
        return replace(source, ids=None, text=self.text.decode(ids))

    def whole(self, source: Source, token_ids: list[int], ended: bool, where: str) -> list[int]:
        """The prompt, a `source` of this translation, with a completion: decoded, rendered in the reader's template
        and encoded. `ended`: it is not cut off. An end-of-text token behind a text becomes the reader's own.

        Raises TextError and ApiError.
        """
        whole = self.reader.whole(source, Answer(where, text=self.text.decode(token_ids), ended=ended))
        if source.messages is None and token_ids[-1] in self.card.end_ids:
            whole = [*whole, *self.reader.text.end_ids[:1]]
        return whole

    def group(self, source: Source, completions: Sequence[tuple[list[int], bool]], where: str) -> Shared:
        """Of a prompt as it was sent, and of each completion its tokens and whether it has `ended`.

        Raises TextError and ApiError.
        """
        source = self.source(source)
        wholes = [self.whole(source, token_ids, ended, where) for token_ids, ended in completions]
        return shared(self.reader.prompt(source), wholes)
