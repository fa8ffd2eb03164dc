"""Pure decodes, one token per row, where the host waits for every step.

Where C++ kernels compute, a decode of as many rows as two before is replayed (`kernels/cpu/recording.py`): its
integers are written to where the recorded step read them.
"""

# torch and numpy type some of the functions used here only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.cpu.native import native
from ...kernels.cpu.recording import Memory, Recording, record
from ...kernels.ops import Sequences
from ...model.batch import Batch
from ...model.kv_cache import KVCache
from ...model.model import Model
from .options import AttentionBackend
from .plan import Plan

Integers = NDArray[np.int64]

OFTEN = 2  # so often a number of rows is decoded first: to record takes as long as two replays save
MOST_RECORDINGS = 64  # numbers of rows, those that were decoded last
MEMORY = 32 << 20  # bytes for a step's activations and logits; where they take more, Python's part is small anyway


class Decodes:
    """What it reads are the runner's arrays by slot: `history` [slots, context], `table` [slots, M] and `adapters`.

    `slots` and `starts` are the last decode's rows, and how many tokens each had before it.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        history: NDArray[np.int32],
        table: NDArray[np.int32],
        adapters: Integers,
        device: torch.device,
        attention: AttentionBackend,
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._attention: AttentionBackend = attention
        self._history, self._table, self._adapters = history, table, adapters
        self.slots = self.starts = np.zeros(0, np.int64)
        self._row_adapters: Tensor | None = None  # of these rows
        self._pages: Tensor | None = None  # [B, M] of these rows, while it still holds
        self._row_numbers = np.arange(len(table) + 1, dtype=np.int32)
        self._inputs = _Inputs.of(table) if device.type == "cpu" and native() is not None else None
        self._recordings: OrderedDict[int, Recording] = OrderedDict()  # by rows
        self._most_rows = len(table)  # for which recordings are tried
        self._times = [0] * (len(table) + 1)  # that so many rows were decoded
        self._memory = Memory(MEMORY)

    def forget_rows(self) -> None:
        """The next decode does not go on from the last."""
        self.slots = np.zeros(0, np.int64)

    def forget_pages(self) -> None:
        """Pages of some rows are others."""
        self._pages = None

    def forget_weights(self) -> None:
        """The model's matrices may lie elsewhere."""
        self._recordings.clear()

    def logits(self, plan: Plan) -> Tensor:
        """[B, V] of the plan's rows, good until the next call."""
        if plan.steady and len(self.slots) == len(plan.slots):
            self.starts += 1
        else:
            self.slots, self.starts = np.array(plan.slots), np.array(plan.starts)
            adapters = self._adapters[self.slots]
            self._row_adapters = self._tensor(adapters) if adapters.any() else None
            self._pages = None
        rows, longest = len(self.slots), int(self.starts.max()) + 1
        pages = self._page_table(longest)
        page, offset = np.divmod(self.starts, self._cache.page_size)
        integers = (
            self._history[self.slots, self.starts].astype(np.int64),
            self.starts.copy(),
            self._table[self.slots, page] * np.int64(self._cache.page_size) + offset,
            (self.starts + 1).astype(np.int32),
        )
        if self._inputs is not None and self._row_adapters is None:
            recording = self._recordings.get(rows)
            self._times[rows] += 1
            if recording is not None or (rows <= self._most_rows and self._times[rows] > OFTEN):
                self._inputs.write(*integers)
                if recording is None:
                    return self._recorded(rows, longest, self._inputs)
                self._recordings.move_to_end(rows)
                return recording.replay()
        ids, positions, slots, lengths = map(self._tensor, integers)
        sequences = self._sequences(self._tensor(self._row_numbers[: rows + 1]), lengths, pages, longest)
        return self._compute(Batch(ids, positions, slots, sequences, self._row_adapters))

    def _recorded(self, rows: int, longest: int, inputs: _Inputs) -> Tensor:
        """Computes what is written to the inputs, and keeps a recording of it where there can be one."""
        batch = inputs.batch(rows, partial(self._sequences, longest=longest))
        logits, recording = record(partial(self._compute, batch), self._memory)
        # The library's attention reads lengths in each step; any other may have looked at them for this one alone.
        if recording is None or recording.calls.get("tandem_attention") != self._model.config.layers:
            self._most_rows = rows - 1
            return logits
        self._recordings[rows] = recording
        if len(self._recordings) > MOST_RECORDINGS:
            least_used, _ = self._recordings.popitem(last=False)
            self._times[least_used] = 0
        return logits

    def _compute(self, batch: Batch) -> Tensor:
        return self._model.logits(self._model.forward(batch, self._cache))

    def _sequences(self, starts: Tensor, lengths: Tensor, pages: Tensor, longest: int) -> Sequences:
        return Sequences(
            starts,
            lengths,
            pages,
            len(lengths),
            1,
            longest,
            deterministic=self._model.deterministic,
            backend=self._attention,
            memo={},
        )

    def _page_table(self, longest: int) -> Tensor:
        """[B, M] int32 of these rows, at least as wide as the longest needs."""
        width = -(-longest // self._cache.page_size)
        if self._pages is None or self._pages.shape[1] < width:
            pages = self._table[self.slots, :width]
            self._pages = self._tensor(pages)
            if self._inputs is not None:
                self._inputs.pages[: len(pages), :width] = pages
        return self._pages

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


class _Inputs(NamedTuple):
    """Where recorded decodes read their integers: the first B entries of each; there are as many as slots."""

    token_ids: Integers
    positions: Integers
    slots: Integers
    lengths: NDArray[np.int32]
    starts: NDArray[np.int32]  # 0, 1, 2 …
    pages: NDArray[np.int32]  # [slots, M]

    @staticmethod
    def of(table: NDArray[np.int32]) -> _Inputs:
        count = len(table)
        ids, positions, slots = np.zeros((3, count), np.int64)
        lengths, starts = np.zeros(count, np.int32), np.arange(count + 1, dtype=np.int32)
        return _Inputs(ids, positions, slots, lengths, starts, np.zeros_like(table))

    def write(self, token_ids: Integers, positions: Integers, slots: Integers, lengths: NDArray[np.int32]) -> None:
        rows = len(token_ids)
        self.token_ids[:rows], self.positions[:rows], self.slots[:rows] = token_ids, positions, slots
        self.lengths[:rows] = lengths

    def batch(self, rows: int, sequences: Callable[[Tensor, Tensor, Tensor], Sequences]) -> Batch:
        """Of these very arrays. `sequences(starts, lengths, pages)`."""
        ids, positions, slots, lengths, _, pages = (torch.from_numpy(array[:rows]) for array in self)
        return Batch(ids, positions, slots, sequences(torch.from_numpy(self.starts[: rows + 1]), lengths, pages))
