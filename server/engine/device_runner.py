"""Steps of one model on a device that runs ahead of the host.

What a sequence is (its tokens, its page table, its sampling parameters) lies on the device by slot. A drawn token is
written into the history there and read from there by the next step, so the host, which learns of it a step later, keeps
nobody waiting. A decode that goes on as before sends nothing to the device; any other step sends its integers in one
copy. Decodes are replayed from CUDA graphs; on devices without graphs the same code runs as it is.

Letters: T tokens of the step, B rows of the plan, S page size, M page-table width, R draws, V vocabulary.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part.

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import ops
from ...kernels.attention import decode_chunks
from ...kernels.ops import Sequences
from ...model.batch import Batch
from ...model.kv_cache import KVCache
from ...model.model import Model
from .device_sampler import DeviceSampler
from .graphs import Graphs, Kind, new_pool, recorded_uses
from .guides import Guides
from .launched import Clock, Launched, logprobs_to_host, to_host
from .options import AttentionBackend
from .plan import Plan
from .pooled import Pooled
from .prompt_rows import Pinned, Read, Rows, factors_of, sizes_of, targets_of
from .request import Request
from .runner import NO_ADAPTERS
from .staging import Staging

Integers = NDArray[np.int64]
NONE: Integers = np.zeros(0, np.int64)


class DeviceRunner:
    """`context` is the most tokens of one sequence; slots go from 0 to `max_seqs` - 1.

    The last page of `cache` is nobody's: rows that only fill a graph up belong to one slot more, whose tokens and pages
    mean nothing. `own_stream`: not the device's common one, so that other models' steps may run at the same time.
    `adapters`: as with `Runner`.
    What a Sampled holds for a failed computation is visible as such, as with `Runner`.
    """

    ahead = True

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
        own_stream: bool = False,
        guides: Guides | None = None,
        adapters: Mapping[str, int] = NO_ADAPTERS,
    ) -> None:
        self.model, self._cache = model, cache
        self._guides, self._adapters = guides, adapters
        self._page_size, self._context = cache.page_size, context
        self._chunks = decode_chunks(context)  # of a sequence at full length
        self._device = torch.device(device)
        self._attention: AttentionBackend = attention
        width = -(-context // cache.page_size)
        # One column more than the context: a last token at its very end is never read again.
        self._history = torch.zeros(max_seqs + 1, context + 1, dtype=torch.int32, device=self._device)
        self._table = torch.zeros(max_seqs + 1, width, dtype=torch.int32, device=self._device)
        self._nobody = max_seqs
        self._table[self._nobody] = cache.pages - 1
        self._requests: list[Request | None] = [None] * max_seqs
        self._adapter = np.zeros(max_seqs, np.int64)
        self._adapter_there = torch.zeros(max_seqs + 1, dtype=torch.int64, device=self._device)
        self._sampler = DeviceSampler(self._history, model.config.vocab_size, end_ids, self._device)
        self._staging = Staging(self._device)
        # Of the last pure decode, on the device: its slots, how many tokens each has, what was drawn. Synchronous rows
        # stand behind the others for one step alone.
        self._slots = torch.full((max_seqs,), self._nobody, dtype=torch.int64, device=self._device)
        self._lengths = torch.ones(max_seqs, dtype=torch.int64, device=self._device)
        self._drawn = torch.zeros(max_seqs, dtype=torch.int64, device=self._device)
        self._prefixes = torch.zeros(2, max_seqs, dtype=torch.int32, device=self._device)  # see ops.attention_work
        self._pooled = None if model.config.pools is None else Pooled(model, max_seqs, self._device)
        self._pinned = Pinned(max_seqs, model, self._device)
        self._row_numbers = torch.arange(max_seqs + 1, dtype=torch.int32, device=self._device)
        self._rows = 0  # of that decode, without synchronous ones; 0 where its slots no longer stand there
        self._behind = 0  # synchronous ones
        self._uses, self._tops, self._grouped, self._adapted = 0, list[int | None](), False, False
        self._logits: Tensor | None = None  # [max_seqs, V] float32, where a decode leaves them for the sampler
        self._recorded: dict[Kind, Graphs] = {}
        self._pool = new_pool(self._device)
        self._stream = torch.cuda.Stream(self._device) if own_stream and self._device.type == "cuda" else None

    def request(self, slot: int) -> Request:
        """The request in a slot."""
        request = self._requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    @torch.inference_mode()
    def prepare(self) -> None:
        """Records the largest decode. Before the first step, because it sets how much memory graphs take."""
        if self._stream is not None:  # weights and buffers were filled on the common one
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self.model.config.generates:
            with self._on_stream():
                self._graphs()
                if self.model.adapters is not None:
                    self._graphs(adapted=True)

    @torch.inference_mode()
    def idle(self) -> bool:
        """Uses a moment without work to record one more decode; whether any are left."""
        graphs = next((graphs for graphs in self._recorded.values() if graphs.missing), None)
        if graphs is not None:
            with self._on_stream():
                self._clear_rows()
                graphs.record_next()
        return any(graphs.missing for graphs in self._recorded.values())

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        with self._on_stream():
            step = Launched(Clock(self._device))
            self._note(plan)
            if plan.decodes == len(plan.slots):
                self._decode(plan, step)
            else:
                self._mixed(plan, step)
            step.clock.stop()
        return step

    def write(self, work: Callable[[], None]) -> None:
        with self._on_stream():
            work()

    def renew(self) -> None:
        pass  # on CUDA devices, where graphs are, matrices are replaced in place

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    # Changes ----------------------------------------------------------------------------------------------------------

    def _note(self, plan: Plan) -> None:
        """What the host keeps of the slots."""
        for slot in plan.left:
            self._requests[slot] = None
            if self._guides is not None:
                self._guides.leave(slot)
        for entered in plan.entered:
            request = entered.request
            self._requests[entered.slot] = request
            self._adapter[entered.slot] = self._adapters[request.adapter]
            if request.sampling is not None:
                self._sampler.enter(entered.slot, request.sampling, entered.choice, len(request.token_ids))
            if self._guides is not None:
                self._guides.enter(entered.slot, request, entered.generated)

    def _send(self, plan: Plan, *arrays: Integers) -> list[Tensor]:
        """The arrays on the device, after what changed in the slots was applied there, and pages were copied."""
        known = [[*entered.request.token_ids, *entered.generated] for entered in plan.entered]
        entered = np.array([entered.slot for entered in plan.entered], np.int64)
        sent = self._staging.send(
            [
                np.array([token for tokens in known for token in tokens], np.int64),
                entered,
                self._adapter[entered],
                np.array([len(tokens) for tokens in known], np.int64),
                np.array(plan.page_updates, np.int64).reshape(-1, 3),
                np.array(plan.copies, np.int64).reshape(-1, 2),
                *arrays,
            ]
        )
        tokens, slots, adapters, counts, updates, copies, *rest = sent
        if plan.entered:
            row, position = self._spread(counts, len(tokens))
            self._history[slots[row], position] = tokens.int()
            self._adapter_there[slots] = adapters
            self._sampler.flush()
        if plan.page_updates:
            self._table[updates[:, 0], updates[:, 1]] = updates[:, 2].int()
        if plan.copies:
            self._cache.copy_pages(copies[:, 0], copies[:, 1])
        return rest

    def _spread(self, counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """(entry, place in it) of each of the `total` elements of entries of these sizes."""
        numbers = torch.arange(len(counts), device=self._device)
        entry = torch.repeat_interleave(numbers, counts, output_size=total)
        return entry, torch.arange(total, device=self._device) - (counts.cumsum(0) - counts)[entry]

    # Pure decodes -----------------------------------------------------------------------------------------------------

    def _decode(self, plan: Plan, step: Launched) -> None:
        rows = len(plan.slots)
        own = rows - plan.synchronous
        if not (plan.steady and 0 < self._rows == own):
            self._uses, self._tops = self._wanted(plan.slots[:own])
            self._grouped, self._adapted = plan.prefixes is not None, self._any_adapter(plan.slots[:own])
        uses, tops = self._wanted(plan.slots[own:])
        uses, tops = self._uses | uses, self._tops + tops
        adapted = self._adapted or self._any_adapter(plan.slots[own:])
        graphs = self._graphs(uses, adapted)
        self._place(plan, own)
        room = self._room(rows)
        needed = sum(decode_chunks(start + 1) for start in plan.starts) if room < rows * self._chunks else 0
        if needed > room:
            logits = self._decode_logits(rows, needed, self._grouped, adapted)
        else:
            graphs.run(graphs.rows_for(rows))
            if recorded_uses(uses) is not None:
                step.tokens = to_host(self._drawn[:rows])
                return
            assert self._logits is not None
            logits = self._logits[:rows]
        self._draw(step, logits, self._slots[:rows], self._lengths[:rows], plan, uses, tops)
        self._lengths[:rows] += 1

    def _place(self, plan: Plan, own: int) -> None:
        """The plan's rows, of which `own` are not synchronous, stand on the device; of steady ones only what is behind
        them in this step or was in the last is sent."""
        steady = plan.steady and 0 < self._rows == own  # graphs that were just recorded have cleared the rows
        first, end = (own, own + max(plan.synchronous, self._behind)) if steady else (0, self._nobody)
        count = len(plan.slots) - first
        slots, lengths = np.full(end - first, self._nobody, np.int64), np.ones(end - first, np.int64)
        slots[:count], lengths[:count] = plan.slots[first:], plan.starts[first:]
        lengths[:count] += 1
        sent = self._send(plan, slots, lengths, NONE if steady else _prefixes(plan, self._nobody))
        if end > first:
            self._slots[first:end] = sent[0]
            self._lengths[first:end] = sent[1]
        if len(sent[2]):
            self._prefixes.copy_(sent[2])
        self._rows, self._behind = own, plan.synchronous

    def _any_adapter(self, slots: list[int]) -> bool:
        return bool(self._adapter[slots].any())

    def _graphs(self, uses: int = 0, adapted: bool = False) -> Graphs:
        """Those that draw as well, where that can be recorded for what the slots use, else those that leave logits."""
        recorded = recorded_uses(uses)
        kind = Kind(recorded, self._grouped, adapted)
        if kind not in self._recorded:
            if recorded is None and self._logits is None:
                shape = (self._nobody, self.model.config.vocab_size)
                self._logits = torch.empty(shape, dtype=torch.float32, device=self._device)
            if recorded is None:
                work = partial(self._decode_only, self._grouped, adapted)
            else:
                work = partial(self._decode_and_draw, self._grouped, adapted, recorded)
            self._clear_rows()
            self._recorded[kind] = Graphs(work, self._nobody, self._device, self._pool)
        return self._recorded[kind]

    def _clear_rows(self) -> None:
        """Only rows of nobody, so that what is recorded now changes nothing."""
        self._slots.fill_(self._nobody)
        self._lengths.fill_(1)
        self._prefixes.zero_()
        self._rows = 0

    def _decode_and_draw(self, grouped: bool, adapted: bool, uses: int, rows: int) -> None:
        slots, lengths = self._slots[:rows], self._lengths[:rows]
        logits = self._decode_logits(rows, self._room(rows), grouped, adapted)
        drawn = self._sampler.sample(logits, slots, lengths, uses, 0)
        self._drawn[:rows] = drawn.tokens
        self._history[slots, lengths] = drawn.tokens.int()
        lengths += slots != self._nobody

    def _decode_only(self, grouped: bool, adapted: bool, rows: int) -> None:
        assert self._logits is not None
        self._logits[:rows] = self._decode_logits(rows, self._room(rows), grouped, adapted)

    def _decode_logits(self, rows: int, room: int, grouped: bool, adapted: bool) -> Tensor:
        """One token per row: the last one of its slot. [rows, V]. `room`: for attention's partial results."""
        slots, lengths = self._slots[:rows], self._lengths[:rows]
        positions = lengths - 1
        sequences = self._sequences(
            *(self._row_numbers[: rows + 1], lengths.int(), self._table[slots], rows, 1, self._context, room),
            self._prefixes if grouped else None,
        )
        batch = self._batch(slots, positions, sequences, adapted)
        return self.model.logits(self.model.forward(batch, self._cache))

    def _room(self, rows: int) -> int:
        """Partial results of attention that a recorded decode has room for: every row at full length, or, where that
        is a lot, twice what the cache holds."""
        held = 2 * decode_chunks(self._cache.pages * self._page_size)
        return min(rows * self._chunks, rows + held)

    def _sequences(
        self,
        starts: Tensor,
        lengths: Tensor,
        table: Tensor,
        decodes: int,
        widest: int,
        longest: int,
        room: int,
        prefixes: Tensor | None,
    ) -> Sequences:
        """With the list of the decodes' work, made once for all layers."""
        work = ops.attention_work(lengths, decodes, max(2, room), prefixes) if decodes else None
        return Sequences(
            starts, lengths, table, decodes, widest, longest, work, self.model.deterministic, self._attention, {}
        )

    def _batch(self, slots: Tensor, positions: Tensor, sequences: Sequences, adapted: bool) -> Batch:
        """The tokens at `positions` [T] of `slots` [T]. `adapted`: a row has an adapter."""
        tokens = self._history[slots, positions].long().clamp_(min=0)  # -1: the model failed, which is told elsewhere
        pages = self._table[slots, positions // self._page_size].long()
        places = pages * self._page_size + positions % self._page_size
        return Batch(tokens, positions, places, sequences, self._adapter_there[slots] if adapted else None)

    # Steps with prompts -----------------------------------------------------------------------------------------------

    def _mixed(self, plan: Plan, step: Launched) -> None:
        self._rows = 0
        slots, starts, counts = (np.array(column, np.int64) for column in (plan.slots, plan.starts, plan.counts))
        firsts = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=firsts[1:])
        ends, lengths = firsts[1:] - 1, starts + counts
        drawing = np.array(plan.samples, np.int64).reshape(-1, 2)
        needed, copies = np.unique(drawing[:, 0], return_inverse=True)
        read = Read.of(plan, ends, self._any_adapter(plan.slots))
        scored = read.at(ends[[row for row, _ in plan.scores]])
        valued, asked = (Rows.of(plan, wanted, ends, read) for wanted in (plan.values, plan.prompt_logprobs))
        requests = [self.request(plan.slots[rows.row]) for rows in plan.prompt_logprobs]
        factors = factors_of(requests, plan.prompt_logprobs)
        sent = self._send(
            plan,
            *(slots, starts, counts, firsts, lengths, _prefixes(plan, plan.decodes)),
            *(read.at(ends[needed]), copies.reshape(-1), drawing[:, 1], lengths[drawing[:, 0]]),
            *(scored, *valued, *asked, targets_of(plan, plan.prompt_logprobs, self._history.shape[1])),
            NONE if factors is None else factors.view(np.int32).astype(np.int64),
            read.at(ends[[row for row, _ in plan.pins]]),
            np.array([pin for _, pin in plan.pins], np.int64),
            NONE if read.numbers is None else read.numbers,
        )
        *sent, numbers = sent
        hidden = self._forward(plan, int(lengths.max()), *sent[:6], read=None if read.numbers is None else numbers)
        rows, places, drawers, histories, scored_rows = sent[6:11]
        valued_rows, asked_rows, (target_places, sent_factors, last_rows, pins) = sent[11:14], sent[14:17], sent[17:]
        if plan.samples:
            logits = self.model.logits(hidden[rows])
            if len(needed) < len(drawing):  # several choices draw from one row
                logits = logits[places]
            self._draw(step, logits, drawers, histories, plan, *self._wanted([slot for _, slot in plan.samples]))
        if plan.scores:
            step.scores = to_host(self.model.scores(hidden[scored_rows]))
        if plan.values:
            step.values = to_host(self.model.values(self._pinned.gather(hidden, *valued_rows)))
            step.parts = sizes_of(plan.values)
        if plan.pooled:
            assert self._pooled is not None
            found = self._pooled.take(plan, hidden, ends.tolist())
            step.pooled = None if found is None else to_host(found)
        if plan.prompt_logprobs:
            wanted = [request.prompt_logprobs or 0 for request in requests]
            ids = self._history.view(-1)[target_places].long()
            scales = None if factors is None else sent_factors.int().view(torch.float32)
            found = self.model.logprobs_of(self._pinned.gather(hidden, *asked_rows), ids, max(wanted), scales)
            step.prompt_logprobs = logprobs_to_host(found)
            edges = np.cumsum([0, *sizes_of(plan.prompt_logprobs)]).tolist()
            step.prompts = list(zip(edges, edges[1:], wanted, strict=False))
        if plan.pins:
            self._pinned.keep(pins, hidden[last_rows])

    def _forward(
        self,
        plan: Plan,
        longest: int,
        slots: Tensor,
        starts: Tensor,
        counts: Tensor,
        firsts: Tensor,
        lengths: Tensor,
        prefixes: Tensor,
        read: Tensor | None,
    ) -> Tensor:
        """Hidden states [R, D] of those that are read of rows of any length."""
        row, place = self._spread(counts, plan.tokens)
        table = self._table[slots, : -(-longest // self._page_size)]
        room = sum(decode_chunks(start + 1) for start in plan.starts[: plan.decodes])
        sequences = self._sequences(
            *(firsts.int(), lengths.int(), table, plan.decodes, max(plan.counts), longest, room),
            None if plan.prefixes is None else prefixes.int(),
        )
        batch = self._batch(slots[row], starts[row] + place, sequences, self._any_adapter(plan.slots))
        batch.read = read
        return self.model.forward(batch, self._cache)

    # Draws ------------------------------------------------------------------------------------------------------------

    def _wanted(self, slots: list[int]) -> tuple[int, list[int | None]]:
        """What the draws of these slots use, and how many likely tokens each wants told; None: not even its own."""
        return self._sampler.uses_of(slots), self._sampler.tops_of(slots)

    def _draw(
        self,
        step: Launched,
        logits: Tensor,
        slots: Tensor,
        lengths: Tensor,
        plan: Plan,
        uses: int,
        tops: list[int | None],
    ) -> None:
        """Draws the tokens [R] and writes them behind their sequences. While the device computes the logits, the host
        waits for the masks of those that follow a grammar."""
        if self._guides is not None and (guides := self._guides.of(slot for _, slot in plan.samples)):
            masks = self._guides.words(guides)
            self._sampler.restrict({plan.samples[place][1]: words for place, words in masks.items()})
            step.advance = partial(self._guides.advance, guides)
        drawn = self._sampler.sample(logits, slots, lengths, uses, max((top or 0 for top in tops), default=0))
        self._history[slots, lengths] = drawn.tokens.int()
        step.tokens = to_host(drawn.tokens)
        if drawn.logprobs is not None:
            step.logprobs, step.tops = logprobs_to_host(drawn.logprobs), tops
        if drawn.policy is not None:
            step.policy, step.policies = to_host(drawn.policy), self._sampler.policies_of(s for _, s in plan.samples)


def _prefixes(plan: Plan, rows: int) -> Integers:
    """`plan.prefixes` as `ops.attention_work` takes them, [2, rows]: behind the plan's own are rows that share nothing.
    Empty where there are none."""
    if plan.prefixes is None:
        return NONE
    prefixes = np.stack((np.arange(rows), np.zeros(rows, np.int64)))
    prefixes[:, : len(plan.prefixes)] = np.array(plan.prefixes).T
    return prefixes
