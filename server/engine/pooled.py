"""What is pooled of the texts that a step computes parts of, kept from chunk to chunk."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.heads import carry, pooled
from ...model.model import Model
from ...model.pooling import PoolingMode
from .plan import Plan


class Pooled:
    """A float64 vector per slot, so that the sum of a text's rows does not depend, once it is rounded to float32, on
    the chunks it came in; and one per pin. Wherever earlier rows count, a text's first chunk starts at position 0 or
    behind a pinned prompt."""

    def __init__(self, model: Model, max_seqs: int, device: torch.device) -> None:
        assert model.config.pools is not None
        self._head = model.head
        self._mode: PoolingMode = model.config.pools
        self._carried, self._kept = torch.zeros(
            2, max_seqs, model.config.output_size, dtype=torch.float64, device=device
        )

    def take(self, plan: Plan, hidden: Tensor, ends: Sequence[int]) -> Tensor | None:
        """hidden [T, D], `ends`: where each row of the plan has its last token -> of the E texts that this step
        completes, the embeddings [E, D] or scores [E, labels], float32."""
        found: list[Tensor] = []
        for row, complete, pin in plan.pooled:
            slot, start, count = plan.slots[row], plan.starts[row], plan.counts[row]
            rows = hidden[ends[row] + 1 - count : ends[row] + 1]
            before = self._carried[slot] if pin is None else self._kept[pin]
            carried = carry(self._mode, rows, before if start else None)
            self._carried[slot] = carried
            if complete:
                found.append(pooled(self._mode, carried, start + count))
        for row, pin in plan.pins:
            self._kept[pin] = self._carried[plan.slots[row]]
        return self._head(torch.stack(found)) if found else None
