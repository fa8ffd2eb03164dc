"""Running a `Model` over token lists with a page pool of its own: chunks, mixed batches, shuffled pages."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.ops import Sequences
from tandem.model.batch import Batch
from tandem.model.kv_cache import KVCache
from tandem.model.model import Model


class PagedRun:
    """Sequences of one model, each with a shuffled page table; every slot holds NaN until it is written.

    Attention is in the fixed order if the model is deterministic.
    """

    def __init__(self, model: Model, sequences: int, context: int, page_size: int = 8, seed: int = 0) -> None:
        self.model, self.page_size = model, page_size
        width = -(-context // page_size)
        generator = torch.Generator().manual_seed(seed)
        self.cache = KVCache(model.config, sequences * width + 3, page_size, model.dtype)
        for layer in self.cache.layers:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)
        self.tables = torch.randperm(self.cache.pages, generator=generator)[: sequences * width].view(sequences, width)
        self.lengths = [0] * sequences

    def step(self, chunks: dict[int, list[int]], adapters: dict[int, int] | None = None) -> dict[int, Tensor]:
        """Append token ids to some sequences in one batch; the hidden states [n, D] of each one's new rows.

        `adapters`: by sequence, its adapter's slot."""
        order = sorted(chunks, key=lambda index: len(chunks[index]) > 1)  # decodes first
        counts = [len(chunks[index]) for index in order]
        positions, slots = [], []
        for index, count in zip(order, counts, strict=True):
            row = torch.arange(self.lengths[index], self.lengths[index] + count)
            positions.append(row)
            slots.append(self.tables[index, row // self.page_size] * self.page_size + row % self.page_size)
            self.lengths[index] += count
        lengths = torch.tensor([self.lengths[index] for index in order], dtype=torch.int32)
        tables = self.tables[order].int()
        used = -(-lengths // self.page_size)
        tables[torch.arange(tables.shape[1]) >= used.unsqueeze(-1)] = 2**31 - 1  # entries past the end may be anything
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        sequences = Sequences(starts, lengths, tables, counts.count(1), max(counts), int(lengths.max()))
        sequences = sequences._replace(deterministic=self.model.deterministic)
        ids = torch.tensor([token for index in order for token in chunks[index]])
        given = None
        if adapters is not None and any(adapters.values()):
            given = torch.tensor([adapters[index] for index in order]).repeat_interleave(torch.tensor(counts))
        hidden = self.model.forward(Batch(ids, torch.cat(positions), torch.cat(slots), sequences, given), self.cache)
        return dict(zip(order, hidden.split(counts), strict=True))
