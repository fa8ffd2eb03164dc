"""What a model's last hidden states become: logits, scores, or an embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels import ops
from .linear import Linear
from .pooling import PoolingMode
from .slots import Place, Slot


class LMHead(nn.Module):
    """hidden [R, D] -> logits [R, V] float32. Tied: `embedding` is the matrix, and the checkpoint may leave it out.

    `softcap`: a logit l becomes softcap · tanh(l / softcap). `older`: another name under which the checkpoint may have
    the matrix.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        place: Place,
        embedding: Tensor | None = None,
        *,
        bias: bool = False,
        softcap: float | None = None,
        older: str | None = None,
    ) -> None:
        super().__init__()
        self.deterministic, self.softcap, self.older = place.deterministic, softcap, older
        self.lm_head = Linear(
            ("lm_head",), hidden_size, (vocab_size,), place, split="vocab", weight=embedding, bias=bias
        )

    @property
    def plain(self) -> bool:
        """Whether the logits are hidden · weightᵀ and nothing more."""
        return self.lm_head.bias is None and self.softcap is None

    def slots(self, path: str) -> Iterator[Slot]:
        if self.older is not None:
            yield Slot(f"{self.older}.weight", self.lm_head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden).float()
        if self.softcap is None:
            return logits
        if self.deterministic:  # as in `ops.activate`: elements behind the last whole vector are rounded otherwise
            return torch.stack([row.div(self.softcap).tanh_().mul_(self.softcap) for row in logits])
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)


class EmbedHead(nn.Module):
    """The hidden states of a text, chunk by chunk -> its embedding [D] float32, not normalised. It has no weights."""

    def __init__(self, mode: PoolingMode) -> None:
        super().__init__()
        self.mode = mode

    def carry(self, rows: Tensor, before: Tensor | None) -> Tensor:
        """rows [n, D] of a chunk, `before`: what was carried so far, None at the text's start -> [D] float64."""
        if self.mode == "mean":
            total = rows.double().sum(0)
            return total if before is None else before + total
        if self.mode == "cls":
            return rows[0].double() if before is None else before
        return rows[-1].double()

    def embedding(self, carried: Tensor, count: int) -> Tensor:
        """Of a text of `count` tokens."""
        return (carried / count if self.mode == "mean" else carried).float()


class ScoreHead(nn.Module):
    """hidden [R, D] -> scores [R, labels], in float32 whatever the model's dtype. A checkpoint may lack the bias."""

    def __init__(self, labels: int, hidden_size: int, place: Place) -> None:
        super().__init__()
        self.deterministic, place = place.deterministic, place._replace(dtype=torch.float32)
        self.weight, self.bias = nn.Buffer(place.empty(labels, hidden_size)), nn.Buffer(place.zeros(labels))

    def slots(self, path: str) -> Iterator[Slot]:
        yield Slot("score.weight", self.weight)
        yield Slot("score.bias", self.bias, optional=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden.float(), self.weight, self.bias, deterministic=self.deterministic)
