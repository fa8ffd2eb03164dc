"""The page tensors: where the K and V of every layer lie. Which page belongs to whom is the engine's business.

Letters: P pages, K kv heads, S page size (tokens), H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.ops import KVLayer
from .config import ModelConfig

SCALE_DTYPE = torch.float16  # one per token and kv head where the pages are int8


class KVCache:
    """K and V separately, `[P, K, S, H]` per layer, in float32, bfloat16, float16 or int8 (with scales `[P, K, S]`).

    Pages are allocated, not cleared: no operation reads a slot that was not written.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.pages, self.page_size, self.dtype = pages, page_size, dtype
        shape = (pages, config.kv_heads, page_size, config.head_size)

        def values() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def scales() -> Tensor | None:
            return torch.empty(shape[:3], dtype=SCALE_DTYPE, device=device) if dtype == torch.int8 else None

        self.layers = [KVLayer(values(), values(), scales(), scales()) for _ in range(config.layers)]

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes in all layers, K, V and scales together."""
        per_head = config.head_size * dtype.itemsize + (SCALE_DTYPE.itemsize if dtype == torch.int8 else 0)
        return 2 * config.layers * config.kv_heads * page_size * per_head

    def copy_pages(self, src: Tensor, dst: Tensor) -> None:
        """Page `dst[i]` becomes a copy of page `src[i]` in every layer. src, dst [C] int64; no page is in both."""
        for layer in self.layers:
            for tensor in layer:
                if tensor is not None:
                    ops.copy_pages(tensor, src, dst)
