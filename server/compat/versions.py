"""What the weights that an answer was computed with are called."""

from __future__ import annotations

from ..engine.request import ModelCard


def version_name(card: ModelCard, version: int) -> str:
    """The trainer's own name where that is the version in force, or Tandem's number of it."""
    return card.weight_label if card.weight_label and version == card.weight_version else str(version)
