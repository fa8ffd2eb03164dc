"""From plans to batches: what the model is given, compared with what the plan's sequences contain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.kernels.ops import TokenLogprobs, token_logprobs
from tandem.model.batch import Batch
from tandem.server.engine.plan import Entered, Plan, PromptRows, Sampled
from tandem.server.engine.request import Request, Sampling
from tandem.server.engine.runner import Runner

PAGE, CONTEXT, SLOTS, VOCAB = 4, 24, 4, 30


class FakeModel:
    """Remembers its batches. A row's most likely token is (token + position) % VOCAB, so a wrong row shows."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB, output_size=VOCAB, pools=None)
        self.deterministic, self.dtype = False, torch.float32
        self.batches: list[Batch] = []
        self.log: list[str] = []

    def forward(self, batch: Batch, cache: Any) -> Tensor:
        self.batches.append(batch)
        self.log.append("forward")
        return batch.kept(torch.nn.functional.one_hot((batch.token_ids + batch.positions) % VOCAB, VOCAB).float() * 9)

    def logits(self, hidden: Tensor) -> Tensor:
        self.log.append(f"logits {len(hidden)}")
        return hidden.clone()

    def logprobs_of(self, hidden: Tensor, targets: Tensor, top: int, factors: Tensor | None) -> TokenLogprobs:
        self.log.append(f"logprobs {len(hidden)}")
        return token_logprobs(hidden, targets, top, factors)

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden.argmax(-1, keepdim=True).float()

    def values(self, hidden: Tensor) -> Tensor:
        return hidden.argmax(-1).float()


class FakeCache:
    page_size = PAGE

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def copy_pages(self, src: Tensor, dst: Tensor) -> None:
        self.log.append(f"copy {src.tolist()} {dst.tolist()}")


def make() -> tuple[Runner, FakeModel]:
    model = FakeModel()
    cache: Any = FakeCache(model.log)
    runner = Runner(model, cache, max_seqs=SLOTS, context=CONTEXT, end_ids=())  # pyright: ignore[reportArgumentType]
    return runner, model


def request(number: int, ids: list[int], **given: Any) -> Request:
    return Request(number, "m", ids, Sampling(**({"max_tokens": 9, "seed": 1, "temperature": 0.0} | given)))


def expected_tokens(ids: list[int], count: int) -> list[int]:
    """The fake model's greedy continuation."""
    ids = list(ids)
    for _ in range(count):
        ids.append((ids[-1] + len(ids) - 1) % VOCAB)
    return ids[-count:]


A, B = [5, 6, 7, 8, 9], [11, 12, 13]
TABLES = {2: [7, 3, 5], 0: [1, 6, 2]}
UPDATES = [(slot, index, page) for slot, table in TABLES.items() for index, page in enumerate(table)]


def first_plan() -> Plan:
    """A whole, B's first two of three tokens."""
    entered = [Entered(2, request(1, A), 0, []), Entered(0, request(2, B), 0, [])]
    return Plan([2, 0], [0, 0], [5, 2], 0, 7, [(0, 2)], entered=entered, page_updates=UPDATES)


def slots_of(slot: int, positions: list[int]) -> list[int]:
    return [TABLES[slot][p // PAGE] * PAGE + p % PAGE for p in positions]


def test_prompts_in_chunks_and_mixed_with_decodes() -> None:
    runner, model = make()
    sampled = runner.execute(first_plan())
    assert sampled.tokens == expected_tokens(A, 1) and sampled.logprobs is None
    batch = model.batches[0]
    assert batch.token_ids.tolist() == A + B[:2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.slots.tolist() == slots_of(2, [0, 1, 2, 3, 4]) + slots_of(0, [0, 1])
    sequences = batch.sequences
    assert sequences.query_starts.tolist() == [0, 5, 7] and sequences.lengths.tolist() == [5, 2]
    assert sequences.page_table.tolist() == [[7, 3], [1, 6]]
    assert (sequences.decodes, sequences.max_query, sequences.max_length) == (0, 5, 5)
    assert model.log == ["forward", "logits 1"]  # the head runs on the rows that need it

    sampled = runner.execute(Plan([2, 0], [5, 2], [1, 1], 1, 2, [(0, 2), (1, 0)]))
    batch = model.batches[1]
    assert batch.token_ids.tolist() == expected_tokens(A, 1) + B[2:]
    assert batch.positions.tolist() == [5, 2] and batch.sequences.lengths.tolist() == [6, 3]
    assert batch.sequences.decodes == 1
    assert sampled.tokens == expected_tokens(A, 2)[1:] + expected_tokens(B, 1)
    for tensor, dtype in ((batch.token_ids, torch.int64), (batch.positions, torch.int64), (batch.slots, torch.int64)):
        assert tensor.dtype == dtype
    for tensor in (batch.sequences.query_starts, batch.sequences.lengths, batch.sequences.page_table):
        assert tensor.dtype == torch.int32


def decode(starts: list[int], steady: bool, updates: list[tuple[int, int, int]] | None = None) -> Plan:
    return Plan([2, 0], starts, [1, 1], 2, 2, [(0, 2), (1, 0)], page_updates=updates or [], steady=steady)


def test_a_steady_decode_equals_one_that_is_told_everything() -> None:
    runs: list[tuple[list[Batch], list[Sampled]]] = []
    for steady in (False, True):
        runner, model = make()
        runner.execute(first_plan())
        runner.execute(Plan([2, 0], [5, 2], [1, 1], 1, 2, [(0, 2), (1, 0)]))
        found = [runner.execute(decode([6, 3], False))]
        for step in range(1, 9):  # across page boundaries; entries arrive as they do from the scheduler
            updates = [(2, 3, 4)] if 6 + step == 12 else []
            found.append(runner.execute(decode([6 + step, 3 + step], steady, updates)))
        runs.append((model.batches, found))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        for name in ("token_ids", "positions", "slots"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.sequences.lengths, other.sequences.lengths)
        assert one.sequences.max_length == other.sequences.max_length
        width = -(-one.sequences.max_length // PAGE)
        assert torch.equal(one.sequences.page_table[:, :width], other.sequences.page_table[:, :width])
    tokens = [sampled.tokens for sampled in runs[1][1]]
    assert tokens == [sampled.tokens for sampled in runs[0][1]]
    assert [pair[0] for pair in tokens] == expected_tokens(A, 11)[2:]
    assert [pair[1] for pair in tokens] == expected_tokens(B, 10)[1:]


def test_pages_are_copied_before_the_forward() -> None:
    runner, model = make()
    plan = first_plan()
    plan.copies = [(1, 9), (2, 8)]
    runner.execute(plan)
    assert model.log[:2] == ["copy [1, 2] [9, 8]", "forward"]


def test_several_choices_draw_from_one_row() -> None:
    """The head runs once; each choice has its own noise and its token in its own slot."""
    runner, model = make()
    ids = request(1, A, temperature=50.0)
    entered = [Entered(slot, ids, choice, []) for choice, slot in enumerate((2, 0, 1))]
    plan = Plan([2], [0], [5], 0, 5, [(0, 2), (0, 0), (0, 1)], entered=entered, page_updates=UPDATES)
    tokens = runner.execute(plan).tokens
    assert model.log == ["forward", "logits 1"] and len(set(tokens)) > 1
    runner.execute(Plan([2, 0, 1], [5, 5, 5], [1, 1, 1], 3, 3, [(0, 2), (1, 0), (2, 1)]))
    assert model.batches[1].token_ids.tolist() == tokens


def test_a_slot_is_taken_over_and_generated_tokens_are_loaded() -> None:
    runner, model = make()
    runner.execute(first_plan())
    entered = [Entered(2, request(3, B), 1, [20, 21])]
    runner.execute(Plan([2], [0], [5], 0, 5, [(0, 2)], left=[2], entered=entered))
    assert model.batches[1].token_ids.tolist() == [*B, 20, 21]
    assert runner.request(2).id == 3


def test_the_last_place_of_the_context_can_be_drawn() -> None:
    runner, _ = make()
    ids = list(np.arange(CONTEXT) % VOCAB)
    entered = [Entered(2, request(1, ids), 0, []), Entered(0, request(2, B), 0, [])]
    plan = Plan([2, 0], [0, 0], [CONTEXT, 3], 0, CONTEXT + 3, [(0, 2), (1, 0)], entered=entered)
    assert runner.execute(plan).tokens == expected_tokens(ids, 1) + expected_tokens(B, 1)


def test_values_come_from_their_rows() -> None:
    runner, _ = make()
    entered = [Entered(2, Request(1, "m", A, None), 0, []), Entered(0, request(2, B), 0, [])]
    rows = [PromptRows(0, 1, 4), PromptRows(1, 1, 3)]
    plan = Plan([2, 0], [0, 0], [5, 3], 0, 8, [], values=rows, entered=entered)
    first, second = runner.execute(plan).values
    assert first == [float((A[place] + place) % VOCAB) for place in (1, 2, 3)]
    assert second == [float((B[place] + place) % VOCAB) for place in (1, 2)]


def test_scores_and_prompt_logprobs_come_from_their_rows() -> None:
    runner, _ = make()
    entered = [Entered(2, Request(1, "m", A, None, prompt_logprobs=2), 0, []), Entered(0, request(2, B), 0, [])]
    rows = [PromptRows(0, 1, 4), PromptRows(1, 0, 2)]
    plan = Plan([2, 0], [0, 0], [5, 3], 0, 8, [], [(1, 0), (0, 2)], rows, entered=entered)
    found = runner.execute(plan)
    assert found.tokens == [] and found.scores == [[float((B[2] + 2) % VOCAB)], [float((A[4] + 4) % VOCAB)]]
    first, second = found.prompt_logprobs
    peak = float(torch.tensor([9.0, *[0.0] * (VOCAB - 1)]).log_softmax(-1)[0])
    assert first.values == pytest.approx(
        [peak if (A[i] + i) % VOCAB == A[i + 1] else peak - 9 for i in (1, 2, 3)], abs=1e-5
    )
    assert first.top_ids[0][0] == (A[1] + 1) % VOCAB and [len(row) for row in first.top_ids] == [2, 2, 2]
    assert len(second.values) == 2 and second.top_ids == [[], []]
