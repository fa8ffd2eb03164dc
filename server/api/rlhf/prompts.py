"""Prompts and completions as they are sent -> token ids of one model, and what the sequences of a group share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.request import ModelCard
from ...text.text import Text, TextError
from ..errors import invalid
from ..protocol import Message, Prompt
from ..service import check_ids
from .bodies import Completion


@dataclass(frozen=True, slots=True)
class Source:
    """A prompt: a text, messages or token ids. Where ids stand beside one of the others, all say the same."""

    where: str  # what errors call the object that holds it; empty: the body itself
    ids: list[int] | None = None
    text: str | None = None
    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    listed: bool = False  # `where` is the prompt itself, an entry of a list

    @classmethod
    def of(cls, body: Any, where: str, may_be_both: bool = False) -> Source:
        """From the fields `prompt`, `prompt_token_ids` and `messages`. `may_be_both`: token ids, and one of the others.

        Raises ApiError unless exactly one says what the prompt is.
        """
        source = cls(where, body.prompt_token_ids, body.prompt, body.messages)
        told = (source.text is not None) + (source.messages is not None)
        alone = told + (source.ids is not None) == 1
        if not alone and not (may_be_both and told == 1):
            beside = "; prompt_token_ids may stand beside one of the others" if may_be_both else ""
            what = f"{where} must hold one" if where else "send one"
            raise invalid(f"{what} of prompt, prompt_token_ids and messages{beside}", source.path("prompt"))
        return source

    def path(self, name: str) -> str:
        if self.listed:
            return re.sub(r"^\w+", lambda _: self.where, name)
        return f"{self.where}.{name}" if self.where else name


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion: exactly one of the first three. `ended`: it is whole, nothing would follow."""

    where: str
    ids: list[int] | None = None
    text: str | None = None
    message: Message | None = None
    ended: bool = True


def source_of(prompt: Prompt, where: str) -> Source:
    """An entry of a list of texts or token ids."""
    ids, text = (prompt, None) if isinstance(prompt, list) else (None, prompt)
    return Source(where, ids, text, listed=True)


def answer_of(completion: Completion, where: str) -> Answer:
    """Raises ApiError unless it is exactly one thing."""
    given = [name for name in ("token_ids", "text", "message") if getattr(completion, name) is not None]
    if len(given) != 1:
        raise invalid(f"{where} must hold one of token_ids, text and message", where)
    return Answer(f"{where}.{given[0]}", completion.token_ids, completion.text, completion.message)


@dataclass(frozen=True, slots=True)
class Shared:
    """The sequences of a group: `prompt` is what all begin with, `members` what each goes on with, never empty."""

    prompt: list[int]
    members: list[list[int]]

    @property
    def tokens(self) -> int:
        """That are computed."""
        return len(self.prompt) + sum(map(len, self.members))

    @property
    def tokens_unshared(self) -> int:
        return len(self.prompt) * len(self.members) + sum(map(len, self.members))


def shared(prompt: Sequence[int], wholes: Sequence[list[int]]) -> Shared:
    """Cut sequences where they part from `prompt` or from each other, but leave each a token."""
    length = min(len(prompt), min(map(len, wholes)) - 1)
    for whole in wholes:
        if whole[:length] != prompt[:length]:
            length = next(i for i in range(length) if whole[i] != prompt[i])
    return Shared(list(prompt[:length]), [whole[length:] for whole in wholes])


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads prompts and completions with one model's tokenizer and chat template. Slow where texts are long."""

    card: ModelCard
    text: Text
    special: bool | None = None  # whether special tokens are added; None: to a text, not to messages
    template: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def prompt(self, source: Source) -> list[int]:
        """A prompt that an answer is to follow. Token ids are taken as they are. Raises TextError and ApiError."""
        if source.ids is not None:
            ids, name = source.ids, "prompt_token_ids"
        elif source.messages is not None:
            ids, name = self._rendered(source, source.messages, opens=True), "messages"
        else:
            ids, name = self._encoded(source.text or "", source.path("prompt")), "prompt"
        if not ids:
            raise invalid(f"{source.path(name)} comes to no tokens", source.path(name))
        check_ids(ids, self.card, source.path(name))
        return ids

    def whole(self, source: Source, answer: Answer | None) -> list[int]:
        """Prompt and answer, or None where the prompt is all there is. An answer to messages is a message, rendered
        without an end unless it has `ended`.

        Raises TextError and ApiError.
        """
        if answer is None:
            if source.messages is None:
                return self.prompt(source)
            whole = self._rendered(source, source.messages, opens=False)
            check_ids(whole, self.card, source.path("messages"))
            return whole
        if answer.ids is not None:
            check_ids(answer.ids, self.card, answer.where)
            return [*self.prompt(source), *answer.ids]
        if source.messages is not None:
            message = answer.message or {"role": "assistant", "content": answer.text or ""}
            whole = self._rendered(source, [*source.messages, message], opens=False, ended=answer.ended)
        elif answer.message is not None:
            raise invalid(f"{answer.where} is a message: its prompt must be messages", answer.where)
        elif source.ids is not None:
            message = f"{answer.where} is a text behind token ids, which has no one encoding: send its token_ids"
            raise invalid(message, answer.where)
        else:
            whole = self._encoded((source.text or "") + (answer.text or ""), answer.where)
        if not whole:
            raise invalid(f"{answer.where} and its prompt come to no tokens", answer.where)
        check_ids(whole, self.card, answer.where)
        return whole

    def group(self, source: Source, answers: Sequence[Answer]) -> Shared:
        """Raises TextError and ApiError."""
        return shared(self.prompt(source), [self.whole(source, answer) for answer in answers])

    def _encoded(self, text: str, param: str) -> list[int]:
        return self.text.encode(text, self.special is not False, param)

    def _rendered(self, source: Source, messages: Sequence[Message], opens: bool, ended: bool = True) -> list[int]:
        try:
            return self.text.render(
                messages,
                source.tools,
                add_generation_prompt=opens,
                continue_final_message=not ended,
                kwargs=self.template,
                add_special_tokens=bool(self.special),
            )
        except TextError as error:
            param = error.param or "messages"
            raise TextError(str(error), source.path(param) if param.startswith("messages") else param) from None
