"""What the weights that an answer was computed with are called."""

from __future__ import annotations

from ..engine.request import ModelCard


def version_name(card: ModelCard, version: int) -> str:
    """Tandem's number of it."""
    return str(version)
