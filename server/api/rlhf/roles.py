"""Which hosted model plays which part in a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from ...engine.request import Gives, ModelCard, Role
from ..errors import ApiError, invalid
from ..service import Service

Part = Literal["policy", "reference", "reward", "value"]
GIVES: Mapping[Part, Gives] = {"policy": "text", "reference": "text", "reward": "scores", "value": "values"}


def card_of(service: Service, part: Part, name: str | None) -> ModelCard:
    """The model named for a part, or the only one hosted in that role. Raises ApiError."""
    param = f"models.{part}"
    return _only(service, part, param) if name is None else _named(service, part, name, param)


def reward_model(service: Service, name: str | None, param: str) -> ModelCard:
    """The reward model of that name; of None or "reward", unless a model is called so, the only one."""
    if name is None or (name == "reward" and service.catalog().find(name) is None):
        return _only(service, "reward", param)
    return _named(service, "reward", name, param)


def cards_of(service: Service, named: Mapping[Part, str | None], needed: Iterable[Part]) -> dict[Part, ModelCard]:
    """The needed parts' models, and those that were named."""
    parts = set(needed) | {part for part, name in named.items() if name is not None}
    return {part: card_of(service, part, named.get(part)) for part in GIVES if part in parts}


def hosted_as(service: Service, role: Role) -> list[ModelCard]:
    return [card for card in service.catalog().models if card.role == role]


def _named(service: Service, part: Part, name: str, param: str) -> ModelCard:
    try:
        return _single(service.card(name, gives=GIVES[part]), param)
    except ApiError as error:
        raise ApiError(error.status, error.message, param=param, code=error.code) from None


def _only(service: Service, part: Part, param: str) -> ModelCard:
    found = hosted_as(service, part)
    if len(found) == 1:
        return _single(found[0], param)
    names = ", ".join(card.name for card in found)
    raise invalid(
        f"{param} is missing, and there are several {part} models: name one of {names}"
        if found
        else f"{param} is missing, and no hosted model is a {part} model",
        param,
    )


def _single(card: ModelCard, param: str) -> ModelCard:
    if card.gives == "scores" and card.labels != 1:
        raise invalid(f"{card.name!r} gives {card.labels} scores per text; a reward is one", param)
    return card
