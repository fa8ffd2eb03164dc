"""What every route needs: the engine's client, the texts of its models, the options."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request as HttpRequest

from ..engine.commands import Command, Refused
from ..engine.link import EngineClient, EngineUnavailable
from ..engine.request import Catalog, Gives, ModelCard, Request, Want
from ..text.grammar import GrammarChecker
from ..text.text import Text, TextError
from .errors import invalid, no_such_model, of_engine, unavailable
from .options import ApiOptions
from .protocol import Common, Prompt
from .traffic import Traffic
from .weights_root import confined

LONG_TEXT = 16_384  # characters; what takes longer than a few milliseconds to encode leaves the event loop

Result = TypeVar("Result")
Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Service:
    client: EngineClient
    texts: Callable[[ModelCard], Text]
    options: ApiOptions
    traffic: Traffic
    settings: Mapping[str, object]  # what the server was told at its start, keys left out
    grammars: GrammarChecker = field(default_factory=GrammarChecker)

    @classmethod
    def of(cls, request: HttpRequest) -> Service:
        return request.app.state.service

    def catalog(self) -> Catalog:
        if self.client.catalog is None:
            raise unavailable(self.client.cause or "the engine is starting")
        return self.client.catalog

    def card(self, name: str | None, gives: Gives) -> ModelCard:
        """The model of that name, or the first of the kind a route can use."""
        catalog = self.catalog()
        kind = "writes text" if gives == "text" else f"gives {gives}"
        if name is None:
            first = next((card for card in catalog.models if card.gives == gives), None)
            if first is None:
                raise invalid(f"no hosted model {kind}", "model")
            return first
        card = catalog.find(name)
        if card is None:
            raise no_such_model(name, catalog)
        if card.gives != gives:
            others = ", ".join(card.name for card in catalog.models if card.gives == gives) or "none"
            article = "an" if card.role == "embedding" else "a"
            raise invalid(f"the model {name!r} is {article} {card.role} model; what {kind} here: {others}", "model")
        return card

    def hosted(self, name: str | None, param: str = "model") -> ModelCard:
        """The model of that name, whatever its kind, or the first. `param`: the field that says the name."""
        catalog = self.catalog()
        card = catalog.models[0] if name is None else catalog.find(name)
        if card is None:
            raise no_such_model(name or "", catalog, param)
        return card

    async def command(self, command: Command[Reply], request_id: str) -> Reply:
        """What the engine answers, once every worker knows what has changed. Raises ApiError, also for a path outside
        --weights-root."""
        try:
            return await self.client.command(confined(command, self.options.weights_root))
        except Refused as refused:
            raise of_engine(refused.error, request_id) from None
        except EngineUnavailable as error:
            raise unavailable(str(error)) from None

    def deadline(self, body: Common) -> float:
        seconds = self.options.max_request_seconds
        return time.monotonic() + (seconds if body.timeout is None else min(seconds, body.timeout))

    def request(self, card: ModelCard, ids: list[int], body: Common, deadline: float, want: Want) -> Request:
        """One that samples nothing: what the model makes of these tokens."""
        return Request(
            id=self.client.next_id(),
            model=card.name,
            token_ids=ids,
            want=frozenset({want}),
            priority=body.priority,
            deadline=deadline,
            cache_salt=body.cache_salt,
        )


async def encode(text: Text, prompts: Sequence[Prompt], special: bool, card: ModelCard, param: str) -> list[list[int]]:
    """Prompts as the token ids the model is given; ids are taken as they are once they are in its vocabulary."""

    def work() -> list[list[int]]:
        return [prompt if isinstance(prompt, list) else text.encode(prompt, special, param) for prompt in prompts]

    size = sum(len(prompt) for prompt in prompts)
    encoded = await in_thread_if(size > LONG_TEXT, work)
    for ids, prompt in zip(encoded, prompts, strict=True):
        if not ids:
            raise invalid(f"{param} is empty: a model needs at least one token", param)
        if isinstance(prompt, list):
            check_ids(ids, card, param)
    return encoded


async def in_thread_if(slow: bool, work: Callable[[], Result]) -> Result:
    try:
        return await asyncio.to_thread(work) if slow else work()
    except TextError as error:
        raise invalid(str(error), error.param) from None


def check_ids(ids: Sequence[int], card: ModelCard, param: str) -> None:
    for extreme in (min(ids), max(ids)) if ids else ():
        if not 0 <= extreme < card.vocab_size:
            raise invalid(f"{param} holds token id {extreme}; the vocabulary has ids 0 to {card.vocab_size - 1}", param)
