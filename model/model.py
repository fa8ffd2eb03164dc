"""A decoder with its head, as the engine sees it.

Letters: T tokens of a step, R rows that a head reads, D model size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch
from .config import ModelConfig
from .heads import LMHead, ScoreHead
from .kv_cache import KVCache
from .linear import linears
from .registry import Decoder


class Model:
    """Weights, no state: everything that a step needs or changes beside them is in its batch and cache."""

    def __init__(
        self, config: ModelConfig, decoder: Decoder, head: LMHead | ScoreHead, dtype: torch.dtype, digest: str
    ) -> None:
        self.config, self.decoder, self.head, self.dtype = config, decoder, head, dtype
        self.digest = digest  # of the files it was loaded from
        tensors = {t.data_ptr(): t.nbytes for part in (decoder, head) for t in part.buffers()}
        copies = sum(linear.copy_bytes for part in (decoder, head) for _, linear in linears(part))
        self.weight_bytes = sum(tensors.values()) + copies

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

    @property
    def head_weight(self) -> Tensor:
        """[V, D], for `ops.logprobs_of`. Language models only."""
        assert isinstance(self.head, LMHead), self.config.architecture
        return self.head.lm_head.weight
