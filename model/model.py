"""A decoder with its head, as the engine sees it.

Letters: T tokens of a step, R rows that a head reads, D model size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.ops import TokenLogprobs
from .batch import Batch
from .config import ModelConfig
from .heads import EmbedHead, LMHead, ScoreHead
from .kv_cache import KVCache
from .linear import linears
from .registry import Decoder
from .slots import Place
from .weights import Naming


class Model:
    """Weights, no state: everything that a step needs or changes beside them is in its batch and cache.

    `deterministic`: results of a row have the same bits whatever rows are computed with it, if the batches say
    `Sequences.deterministic`, too.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        head: LMHead | ScoreHead | EmbedHead,
        place: Place,
        naming: Naming,
        digest: str,
    ) -> None:
        self.config, self.decoder, self.head = config, decoder, head
        self.place, self.dtype, self.deterministic = place, place.dtype, place.deterministic
        self.naming = naming  # of the tensors of an update
        self.digest = digest  # of the files it was loaded from
        tensors = {t.data_ptr(): t.nbytes for part in (decoder, head) for t in part.buffers()}
        packed = sum(linear.packed_bytes for part in (decoder, head) for _, linear in linears(part))
        self.weight_bytes = sum(tensors.values()) + packed

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [T, D] after the last norm, in the model's dtype. Writes the rows' K and V into the cache."""
        return self.decoder(batch, cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R, V] float32. Language models only."""
        assert isinstance(self.head, LMHead), self.config.architecture
        return self.head(hidden)

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> [R, labels] float32. Reward models only."""
        assert isinstance(self.head, ScoreHead), self.config.architecture
        return self.head(hidden)

    @torch.inference_mode()
    def logprobs_of(self, hidden: Tensor, targets: Tensor, top: int = 0) -> TokenLogprobs:
        """`ops.token_logprobs` of the logits of hidden [T, D], which exist a few rows at a time; targets [T] int64.

        On CPUs and in deterministic mode these are the bits that `logits` gives. Language models only.
        """
        assert isinstance(self.head, LMHead), self.config.architecture
        if hidden.device.type != "cpu" and not self.deterministic and self.head.plain:
            return ops.logprobs_of(hidden, self.head.lm_head.weight, targets, top)
        return ops.logprobs_in_rounds(self.head, hidden, targets, top, self.config.vocab_size)
