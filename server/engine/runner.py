"""One step of one model on tensors: a Plan of integers in, tokens, scores and log-probabilities out.

Everything a step needs of a sequence lies in arrays by slot that live as long as the runner: its tokens, its page
table, its sampling parameters. A plan says what changed; the batch of a step is gathered from the arrays, without a
loop over tokens, and a pure decode that goes on as before only counts its positions on.

Letters: T tokens of the step, B rows of the plan, S page size, M page-table width, R draws.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part, and Tensor.tolist not at all.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.ops import Sequences
from ...model.batch import Batch
from ...model.kv_cache import KVCache
from ...model.model import Model
from .decodes import Decodes
from .guides import Guides
from .options import AttentionBackend
from .plan import Plan, Sampled
from .pooled import Pooled
from .prompt_rows import Pinned, Read, Rows, factors_of, sizes_of, targets_of
from .request import Logprobs, Request
from .sampler import Sampler

Integers = NDArray[np.int64]
NO_ADAPTERS: Mapping[str, int] = MappingProxyType({"": 0})


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is over already."""

    sampled: Sampled
    seconds: float | None = None

    def wait(self) -> Sampled:
        return self.sampled


class Runner:
    """`context` is the most tokens of one sequence; slots go from 0 to `max_seqs` - 1. `adapters`: the number of each
    that a request may carry, as `Batch.adapters` has it; it may change between steps.

    What a Sampled holds for a failed computation is visible as such: token -1, NaN or infinite scores, values,
    log-probabilities and embeddings. The engine turns them into errors.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        max_seqs: int,
        context: int,
        end_ids: tuple[int, ...],
        device: str = "cpu",
        attention: AttentionBackend = "triton",
        guides: Guides | None = None,
        adapters: Mapping[str, int] = NO_ADAPTERS,
    ) -> None:
        self.model, self._cache = model, cache
        self._guides, self._adapters = guides, adapters
        self._page_size = cache.page_size
        self._context = context
        self._device = torch.device(device)
        self._attention: AttentionBackend = attention
        self._history = np.zeros((max_seqs, context), np.int32)
        self._table = np.zeros((max_seqs, -(-context // cache.page_size)), np.int32)
        self._requests: list[Request | None] = [None] * max_seqs
        self._adapter = np.zeros(max_seqs, np.int64)
        self._sampler = Sampler(self._history, model.config.vocab_size, end_ids)
        self._pooled = None if model.config.pools is None else Pooled(model, max_seqs, self._device)
        self._pinned = Pinned(max_seqs, model, self._device)
        self._decodes = Decodes(model, cache, self._history, self._table, self._adapter, self._device, self._attention)

    def request(self, slot: int) -> Request:
        """The request in a slot."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    ahead = False

    def launch(self, plan: Plan) -> Done:
        return Done(self.execute(plan))

    def prepare(self) -> None:
        pass

    def idle(self) -> bool:
        return False

    def write(self, work: Callable[[], None]) -> None:
        work()

    def renew(self) -> None:
        self._decodes.forget_weights()

    @torch.inference_mode()
    def execute(self, plan: Plan) -> Sampled:
        self._apply(plan)
        result = Sampled([])
        if plan.decodes == len(plan.slots):
            logits = self._decodes.logits(plan)
            self._draw(logits, self._decodes.slots, self._decodes.starts + 1, result)
            return result
        self._decodes.forget_rows()
        batch, ends, read = self._mixed_batch(plan)
        hidden = self.model.forward(batch, self._cache)
        if plan.samples:
            self._sample(plan, hidden, read.at(ends), result)
        if plan.scores:
            rows = read.at(ends[[row for row, _ in plan.scores]])
            result.scores = self.model.scores(hidden[self._tensor(rows)]).tolist()
        if plan.values:
            rows = self._pinned.gather(hidden, *map(self._tensor, Rows.of(plan, plan.values, ends, read)))
            result.values = [part.tolist() for part in self.model.values(rows).split(sizes_of(plan.values))]
        if plan.prompt_logprobs:
            result.prompt_logprobs = self._prompt_logprobs(
                plan, hidden, Rows.of(plan, plan.prompt_logprobs, ends, read)
            )
        if plan.pooled:
            assert self._pooled is not None
            found = self._pooled.take(plan, hidden, ends.tolist())
            result.pooled = [] if found is None else found.tolist()
        if plan.pins:
            rows, pins = np.array(plan.pins).T
            self._pinned.keep(self._tensor(pins), hidden[self._tensor(read.at(ends[rows]))])
        return result

    def _apply(self, plan: Plan) -> None:
        """Takes over what changed in the slots; copies pages."""
        for slot in plan.left:
            self._requests[slot] = None
            if self._guides is not None:
                self._guides.leave(slot)
        for entered in plan.entered:
            slot, request = entered.slot, entered.request
            prompt, generated = len(request.token_ids), len(entered.generated)
            self._history[slot, :prompt] = request.token_ids
            if generated:
                self._history[slot, prompt : prompt + generated] = entered.generated
            self._requests[slot] = request
            self._adapter[slot] = self._adapters[request.adapter]
            if request.sampling is not None:
                self._sampler.enter(slot, request.sampling, entered.choice, prompt)
            if self._guides is not None:
                self._guides.enter(slot, request, entered.generated)
        if plan.page_updates:
            updates = np.array(plan.page_updates)
            self._table[updates[:, 0], updates[:, 1]] = updates[:, 2]
            self._decodes.forget_pages()
        if plan.copies:
            pages = self._tensor(np.array(plan.copies))
            self._cache.copy_pages(pages[:, 0], pages[:, 1])

    def _mixed_batch(self, plan: Plan) -> tuple[Batch, Integers, Read]:
        """Rows of any length, where in the batch each row's last token stands, [B], and which tokens' rows are read."""
        slots, starts, counts = np.array(plan.slots), np.array(plan.starts), np.array(plan.counts)
        firsts = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=firsts[1:])
        positions = np.arange(plan.tokens) + np.repeat(starts - firsts[:-1], counts)
        slot = np.repeat(slots, counts)
        lengths = starts + counts
        longest = int(lengths.max())
        page, offset = np.divmod(positions, self._page_size)
        adapters, ends = self._adapters_of(slot), firsts[1:] - 1
        read = Read.of(plan, ends, adapters is not None)
        batch = Batch(
            self._tensor(self._history[slot, positions].astype(np.int64)),
            self._tensor(positions),
            self._tensor(self._table[slot, page] * np.int64(self._page_size) + offset),
            Sequences(
                self._tensor(firsts.astype(np.int32)),
                self._tensor(lengths.astype(np.int32)),
                self._page_table(slots, longest),
                plan.decodes,
                int(counts.max()),
                longest,
                deterministic=self.model.deterministic,
                backend=self._attention,
                memo={},
            ),
            adapters,
            None if read.numbers is None else self._tensor(read.numbers),
        )
        return batch, ends, read

    def _adapters_of(self, slots: Integers) -> Tensor | None:
        """[T] int64, None where no row has one."""
        adapters = self._adapter[slots]
        return self._tensor(adapters) if adapters.any() else None

    def _page_table(self, slots: Integers, longest: int) -> Tensor:
        """[B, M] int32, as wide as the longest sequence needs."""
        return self._tensor(self._table[slots, : -(-longest // self._page_size)])

    def _sample(self, plan: Plan, hidden: Tensor, ends: Integers, result: Sampled) -> None:
        """Draws the plan's tokens from hidden states [R, D], where each row of the plan has its last one at `ends`."""
        pairs = np.array(plan.samples)
        rows, slots = pairs[:, 0], pairs[:, 1]
        lengths = (np.array(plan.starts) + np.array(plan.counts))[rows]
        needed, copies = np.unique(rows, return_inverse=True)
        logits = self.model.logits(hidden[self._tensor(ends[needed])])
        if len(needed) < len(rows):  # several choices draw from one row
            logits = logits[self._tensor(copies)]
        self._draw(logits, slots, lengths, result)

    def _draw(self, logits: Tensor, slots: Integers, lengths: Integers, result: Sampled) -> None:
        """A token for each slot, from logits [R, V], written behind the `lengths` that its sequence has."""
        guides = {} if self._guides is None else self._guides.of(slots.tolist())
        masks = {} if self._guides is None else self._guides.words(guides)
        drawn, result.logprobs = self._sampler.sample(logits, slots, lengths, masks)
        tokens = drawn.cpu().numpy()
        if int(lengths.max()) < self._context:
            self._history[slots, lengths] = tokens
        else:  # a last token at the very end of the context is never read again
            fits = lengths < self._context
            self._history[slots[fits], lengths[fits]] = tokens[fits]
        result.tokens = tokens.tolist()
        if self._guides is not None and guides:
            result.failures = self._guides.advance(guides, result.tokens)

    def _prompt_logprobs(self, plan: Plan, hidden: Tensor, wanted: Rows) -> list[Logprobs]:
        """The columns of each entry of `plan.prompt_logprobs`; all entries go through the head together."""
        entries = plan.prompt_logprobs
        requests = [self.request(plan.slots[wanted.row]) for wanted in entries]
        top = [request.prompt_logprobs or 0 for request in requests]
        targets = self._history.ravel()[targets_of(plan, entries, self._history.shape[1])]
        rows = self._pinned.gather(hidden, *map(self._tensor, wanted))
        factors = factors_of(requests, entries)
        chosen = self._tensor(targets.astype(np.int64))
        found = self.model.logprobs_of(rows, chosen, max(top), None if factors is None else self._tensor(factors))
        values, ranks, top_values, top_ids = (column.tolist() for column in found)
        columns: list[Logprobs] = []
        begin = 0
        for size, k in zip(sizes_of(entries), top, strict=True):
            part = slice(begin, begin + size)
            begin = part.stop
            ids, likely = ([row[:k] for row in column[part]] for column in (top_ids, top_values))
            columns.append(Logprobs(values[part], ranks[part], ids, likely))
        return columns

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
