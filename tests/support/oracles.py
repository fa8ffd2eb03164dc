"""What transformers makes of a checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def scorer(path: Path) -> Callable[[list[int]], float]:
    """The first score of a *ForSequenceClassification."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, 0].item()

    return score
