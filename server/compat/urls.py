"""What the URL of a reward client says, since its body cannot: `?model=NAME`, where several models give scores, and
`?normalize=true`, for rewards that are shifted and scaled as `/v1/rlhf/normalize` found."""

from __future__ import annotations

from fastapi import Request

from ..api.errors import invalid
from ..api.scoring import reward_model
from ..api.service import Service
from ..engine.request import ModelCard


def model_of(request: Request, named: str | None) -> ModelCard:
    """`named`: in the body, which goes before. Raises ApiError."""
    return reward_model(Service.of(request), named or request.query_params.get("model"))


def rewards_of(request: Request, card: ModelCard, scores: list[list[float]]) -> list[float]:
    """Raw, unless the URL asks otherwise. Raises ApiError."""
    wanted = request.query_params.get("normalize", "false")
    if wanted not in ("true", "false"):
        raise invalid(f"normalize is {wanted[:80]!r}; it must be true or false", "normalize")
    mean, std = (card.reward_mean, card.reward_std) if wanted == "true" else (0.0, 1.0)
    return [(score - mean) / std for (score,) in scores]
