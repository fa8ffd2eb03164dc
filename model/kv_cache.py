"""The page tensors: where the K and V of every layer lie. Which page belongs to whom is the engine's business.

Letters: P pages, L layers, K kv heads, S page size (tokens), H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.ops import KVLayer
from .config import ModelConfig

SCALE_DTYPE = torch.float16  # one per token and kv head where the pages are int8


class KVCache:
    """K and V of each layer, `[P, K, S, H]`, in float32, bfloat16, float16 or int8 (with scales `[P, K, S]`).

    A page is one piece of memory, `[L, K and V, K, S, H]` and behind it the scales `[L, K and V, K, S]`: the tensors of
    a layer are views whose pages are `bytes_per_page` apart. So pages of several models may share one buffer.
    Pages are allocated, not cleared: no operation reads a slot that was not written.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory: Tensor | None = None,
    ) -> None:
        """`memory` [bytes] uint8, on `device`, holds the pages from its beginning on; None: memory of their own."""
        self.pages, self.page_size, self.dtype = pages, page_size, dtype
        size = self.bytes_per_page(config, page_size, dtype)
        if memory is None:
            memory = torch.empty(pages * size, dtype=torch.uint8, device=device)
        self._whole = memory[: pages * size].view(dtype).view(pages, -1)  # [P, values of a page]
        shape = (pages, config.layers, 2, config.kv_heads, page_size)
        count = 2 * config.layers * config.kv_heads * page_size  # tokens and heads of a page
        values = self._whole[:, : count * config.head_size].view(*shape, config.head_size)
        if dtype == torch.int8:
            rest = self._whole[:, count * config.head_size :].view(SCALE_DTYPE)
            scales = rest[:, :count].view(shape)
            self.layers = [
                KVLayer(values[:, layer, 0], values[:, layer, 1], scales[:, layer, 0], scales[:, layer, 1])
                for layer in range(config.layers)
            ]
        else:
            self.layers = [KVLayer(values[:, layer, 0], values[:, layer, 1]) for layer in range(config.layers)]

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes in all layers, K, V and scales together.

        With scales it is filled up to a multiple of what two heads' parts take, so that pages are a whole number of
        heads' parts apart.
        """
        part = page_size * config.head_size * dtype.itemsize  # of a head in K or V
        heads = 2 * config.layers * config.kv_heads
        if dtype != torch.int8:
            return heads * part
        scales = heads * page_size * SCALE_DTYPE.itemsize
        return heads * part + -(-scales // (2 * part)) * 2 * part

    def copy_pages(self, src: Tensor, dst: Tensor) -> None:
        """Page `dst[i]` becomes a copy of page `src[i]` in every layer. src, dst [C] int64; no page is in both."""
        ops.copy_pages(self._whole, src, dst)
