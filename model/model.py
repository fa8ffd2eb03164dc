"""A decoder with its head, as the engine sees it.

Letters: T tokens of a step, R rows that are read of it or that a head reads, D model size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import TokenLogprobs
from .adapters import Adapters
from .batch import Batch
from .config import ModelConfig
from .heads import EmbedHead, LMHead, ScoreHead
from .kv_cache import KVCache
from .linear import linears
from .registry import Decoder
from .slots import Place
from .weights import Naming

AnyHead = LMHead | ScoreHead | EmbedHead


class Model:
    """Weights, no state: everything that a step needs or changes beside them is in its batch and cache.

    `deterministic`: results of a row have the same bits whatever rows are computed with it, if the batches say
    `Sequences.deterministic`, too. `adapters`: None until there is room for any.
    """

    adapters: Adapters | None = None

    def __init__(
        self, config: ModelConfig, decoder: Decoder, head: AnyHead, place: Place, naming: Naming, digest: str
    ) -> None:
        self.config, self.decoder, self.head = config, decoder, head
        self.place, self.dtype, self.deterministic = place, place.dtype, place.deterministic
        self.naming = naming  # of the tensors of an update
        self.digest = digest  # of the files it was loaded from
        self.weight_bytes = _bytes(decoder, head)

    def sharing(self, config: ModelConfig, digest: str, head: AnyHead | None = None) -> Model:
        """A model on this one's decoder, with this one's head or another. What it shares is not counted again."""
        model = Model(config, self.decoder, self.head if head is None else head, self.place, self.naming, digest)
        model.weight_bytes = 0 if head is None else _bytes(head)
        return model

    def make_room(self, adapters: int, rank: int) -> None:
        """For so many adapters of at most this rank; their memory counts as weights'. Once, before the first step."""
        assert self.adapters is None
        self.adapters = Adapters(self.decoder, adapters, rank, self.place)
        self.weight_bytes += self.adapters.nbytes

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm, in the model's dtype, of the rows that the batch says are read.
        Writes all rows' K and V into the cache."""
        if self.adapters is None:
            assert batch.adapters is None, "rows with an adapter, but no room for any was made"
            return self.decoder(batch, cache)
        with self.adapters.beside(batch.adapters):
            return self.decoder(batch, cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R, V] in the model's dtype, or float32. Language models only."""
        assert isinstance(self.head, LMHead), self.config.architecture
        return self.head(hidden)

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R, labels] float32. Reward models only."""
        assert isinstance(self.head, ScoreHead), self.config.architecture
        return self.head(hidden)

    @torch.inference_mode()
    def values(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R] float32. Models with one score or value per row only."""
        assert isinstance(self.head, ScoreHead) and self.config.labels == 1, self.config.architecture
        return self.head(hidden).squeeze(-1)

    @torch.inference_mode()
    def logprobs_of(
        self, hidden: Tensor, targets: Tensor, top: int = 0, factors: Tensor | None = None
    ) -> TokenLogprobs:
        """`ops.token_logprobs` of the logits of hidden [T, D], which exist a few rows at a time; targets [T] int64,
        factors [T] float32.

        On CPUs and in deterministic mode these are the bits that `logits` gives. Language models only.
        """
        assert isinstance(self.head, LMHead), self.config.architecture
        if hidden.device.type != "cpu" and not self.deterministic and self.head.plain:
            return ops.logprobs_of(hidden, self.head.lm_head.weight, targets, top, factors)
        return ops.logprobs_in_rounds(self.head, hidden, targets, top, self.config.vocab_size, factors)


def _bytes(*parts: nn.Module) -> int:
    """Of their weights, shared ones counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for part in parts for tensor in part.buffers()}
    return sum(tensors.values()) + sum(linear.packed_bytes for part in parts for _, linear in linears(part))
