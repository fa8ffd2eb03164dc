"""What a model's last hidden states become: logits, scores, values, or an embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels import ops
from .config import ScoreConfig
from .linear import Linear
from .pooling import PoolingMode
from .slots import Place, Slot


class LMHead(nn.Module):
    """hidden [R, D] -> logits [R, V], same dtype. Tied: `embedding` is the matrix, and the checkpoint may leave it out.

    `softcap`: a logit l becomes softcap · tanh(l / softcap), in float32. `older`: another name under which the
    checkpoint may have the matrix.
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
            ("lm_head",),
            hidden_size,
            (vocab_size,),
            place,
            split="vocab",
            weight=embedding,
            bias=bias,
            scheme=place.quantization.head,
        )

    @property
    def plain(self) -> bool:
        """Whether the logits are hidden · weightᵀ, with the very weight that is kept, and nothing more."""
        return self.lm_head.bias is None and self.softcap is None and not self.lm_head.quantized

    def slots(self, path: str) -> Iterator[Slot]:
        if self.older is not None:
            yield next(self.lm_head.slots("lm_head"))._replace(name=f"{self.older}.weight")

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        if self.softcap is None:
            return logits
        logits = logits.float()
        if self.deterministic:  # as in `ops.activate`: elements behind the last whole vector are rounded otherwise
            return torch.stack([row.div(self.softcap).tanh_().mul_(self.softcap) for row in logits])
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)


def carry(mode: PoolingMode, rows: Tensor, before: Tensor | None) -> Tensor:
    """rows [n, D] of a text's chunk, `before`: what was carried so far, None at the text's start -> [D] float64."""
    if mode == "mean":
        total = rows.double().sum(0)
        return total if before is None else before + total
    if mode == "cls":
        return rows[0].double() if before is None else before
    return rows[-1].double()


def pooled(mode: PoolingMode, carried: Tensor, count: int) -> Tensor:
    """What was carried [D] over all `count` tokens of a text -> [D] float32."""
    return (carried / count if mode == "mean" else carried).float()


class EmbedHead(nn.Module):
    """pooled [R, D] -> embeddings [R, D] float32, not normalised. It has no weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class ScoreHead(nn.Module):
    """hidden [R, D] -> scores or values [R, labels], in float32 whatever the model's dtype."""

    def __init__(self, config: ScoreConfig, labels: int, hidden_size: int, place: Place) -> None:
        super().__init__()
        place, sizes = place._replace(dtype=torch.float32), (hidden_size, *config.inner, labels)
        self.layers = nn.ModuleList(
            ScoreLayer(name, ins, outs, config.bias, place)
            for name, ins, outs in zip(config.layers, sizes, sizes[1:], strict=False)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden if index == 0 else hidden.relu_())
        return hidden


class ScoreLayer(nn.Module):
    """x [R, ins] -> [R, outs]. `name`: the checkpoint's; without `bias` it may lack that."""

    def __init__(self, name: str, ins: int, outs: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.name, self.needs_bias, self.deterministic = name, bias, place.deterministic
        self.weight, self.bias = nn.Buffer(place.empty(outs, ins)), nn.Buffer(place.zeros(outs))

    def slots(self, path: str) -> Iterator[Slot]:
        yield Slot(f"{self.name}.weight", self.weight)
        yield Slot(f"{self.name}.bias", self.bias, optional=not self.needs_bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, deterministic=self.deterministic)
