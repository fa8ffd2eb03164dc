"""The device sampler against the host's, token for token, over mixes of every parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.kernels import sampling as ops
from tandem.server.engine import device_sampler
from tandem.server.engine.device_sampler import DeviceSampler
from tandem.server.engine.guides import Words, words_of
from tandem.server.engine.launched import Clock, Launched
from tandem.server.engine.request import Logprobs, Sampling
from tandem.server.engine.sampler import Sampler

VOCAB, CONTEXT, PROMPT, SLOTS = 300, 40, 6, 8
END = (2, 3)


def random_sampling(generator: np.random.Generator) -> Sampling:
    """Each parameter in use in some of them, rarely all at once."""

    def maybe(value: Any, otherwise: Any, chance: float = 0.3) -> Any:
        return value if generator.random() < chance else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, VOCAB, count).tolist())

    return Sampling(
        max_tokens=20,
        seed=int(generator.integers(0, 2**64, dtype=np.uint64)),
        temperature=maybe(0.0, float(generator.uniform(0.05, 2)), 0.2),
        top_p=maybe(float(generator.uniform(0.01, 1)), 1.0),
        top_k=maybe(int(generator.integers(1, VOCAB + 20)), 0),
        min_p=maybe(float(generator.uniform(0, 1) ** 4), 0.0),
        presence_penalty=maybe(float(generator.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(generator.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(generator.uniform(0.5, 2)), 1.0),
        min_tokens=maybe(int(generator.integers(1, 20)), 0),
        stop_ids=maybe(ids(3), ()),
        logit_bias=tuple(zip(ids(20), generator.uniform(-9, 9, 20).tolist(), strict=True)) if maybe(1, 0) else (),
        allowed_ids=maybe(ids(30), (), 0.15),
        bad_words=maybe(tuple((*prefix,) for prefix in (ids(1), ids(2), (5, *ids(1)), (4, 5, 7))), ()),
        logprobs=maybe(int(generator.integers(0, 6)), None, 0.4),
        logprobs_mode=maybe("processed", "raw", 0.5),
        policy_logprobs=maybe(True, False, 0.5),
        grammar=maybe("some", "", 0.2),
    )


class Both:
    """Two samplers over the same slots."""

    def __init__(self, slots: int = SLOTS, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        history = self.generator.integers(0, VOCAB, (slots, CONTEXT)).astype(np.int32)
        history[::2, PROMPT + 4 : PROMPT + 6] = 4, 5  # so that bad words of several tokens come up
        self.host = Sampler(history, VOCAB, END)
        self.device = DeviceSampler(torch.from_numpy(history), VOCAB, END, "cpu")
        self.entered: dict[int, Sampling] = {}

    def enter(self, slot: int, sampling: Sampling, choice: int = 0) -> None:
        self.host.enter(slot, sampling, choice, PROMPT)
        self.device.enter(slot, sampling, choice, PROMPT)
        self.entered[slot] = sampling

    def masks(self, slots: list[int]) -> dict[int, Words]:
        """By slot with a grammar, half of the ids that its request allows."""
        found: dict[int, Words] = {}
        for slot in slots:
            sampling = self.entered[slot]
            if sampling.grammar:
                ids = sampling.allowed_ids or range(VOCAB)
                found[slot] = words_of([token for token in ids if self.generator.random() < 0.5], VOCAB)
        return found

    def sample(self, logits: Tensor, slots: list[int], lengths: list[int]) -> None:
        rows, length = np.array(slots), np.array(lengths)
        masks = self.masks(slots)
        by_row = {row: masks[slot] for row, slot in enumerate(slots) if slot in masks}
        expected, columns = self.host.sample(logits.clone(), rows, length, by_row)
        self.device.flush()
        if masks:
            self.device.restrict(masks)
        before = logits.clone()
        uses, tops = self.device.uses_of(slots), self.device.tops_of(slots)
        top = max(wanted or 0 for wanted in tops)
        drawn = self.device.sample(logits, torch.tensor(slots), torch.tensor(lengths), uses, top)
        assert torch.equal(logits, before)
        assert drawn.tokens.tolist() == expected.tolist()
        assert (drawn.logprobs is None) == (columns is None)
        if drawn.logprobs is not None and columns is not None:
            policies = self.device.policies_of(slots)
            step = Launched(Clock(torch.device("cpu")), drawn.tokens, drawn.logprobs, tops, drawn.policy, policies)
            for found, wanted in zip(step.wait().logprobs or [], columns, strict=True):
                assert_equal(found, wanted)


def assert_equal(found: Logprobs | None, wanted: Logprobs | None) -> None:
    if wanted is None or found is None:
        assert found is wanted
        return
    assert found.values == pytest.approx(wanted.values, abs=1e-5, nan_ok=True)
    assert found.policy == pytest.approx(wanted.policy, abs=1e-5, nan_ok=True)
    assert found.ranks == wanted.ranks and found.top_ids == wanted.top_ids
    assert found.top_values[0] == pytest.approx(wanted.top_values[0], abs=1e-5)


@pytest.mark.parametrize("seed", range(25))
def test_it_draws_what_the_host_draws(seed: int) -> None:
    """Slots are entered anew between steps, some twice before one, and rows come in any order."""
    both = Both(seed=seed)
    generator = both.generator
    for slot in range(SLOTS):
        both.enter(slot, random_sampling(generator), slot % 3)
    for step in range(8):
        for slot in generator.integers(0, SLOTS, 3).tolist():
            both.enter(slot, random_sampling(generator), step)
        slots = generator.permutation(SLOTS)[: int(generator.integers(1, SLOTS + 1))].tolist()
        lengths = generator.integers(PROMPT, CONTEXT - 1, len(slots)).tolist()
        logits = torch.from_numpy(generator.normal(0, 3, (len(slots), VOCAB)).astype(np.float32))
        both.sample(logits, slots, lengths)


def test_it_draws_what_the_host_draws_where_nothing_can_be_drawn() -> None:
    both = Both(4)
    both.enter(0, Sampling(20, 1, allowed_ids=(7,), bad_words=((7,),)))
    both.enter(1, Sampling(20, 1, top_p=0.5, logprobs=2))
    both.enter(2, Sampling(20, 1, temperature=0.0, logprobs=0))
    both.enter(3, Sampling(20, 1, repetition_penalty=1e308, allowed_ids=(8, 9)))
    logits = torch.zeros(4, VOCAB)
    logits[1, 5], logits[2, 6] = torch.nan, torch.inf
    both.device.flush()
    drawn = both.device.sample(logits, torch.arange(4), torch.full((4,), 9), both.device.uses_of(range(4)), 2)
    assert drawn.tokens.tolist()[:3] == [-1, -1, -1] and int(drawn.tokens[3]) in (8, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    both = Both(4, seed=5)
    for slot in range(4):
        both.enter(slot, random_sampling(both.generator))
    logits = (torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    rows, lengths = torch.arange(4), torch.full((4,), 12)
    both.device.flush()
    uses = both.device.uses_of(range(4))
    narrow = both.device.sample(logits, rows, lengths, uses, 3)
    wide = both.device.sample(logits.float(), rows, lengths, uses, 3)
    assert torch.equal(narrow.tokens, wide.tokens)
    assert (narrow.logprobs is None) == (wide.logprobs is None)


def test_nothing_changes_before_the_flush_and_nothing_is_sent_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(2)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    slot, length = torch.tensor([1]), torch.tensor([9])
    best = int(logits.argmax())

    def token() -> int:
        return int(both.device.sample(logits, slot, length, ops.DRAW | ops.EDITS, 0).tokens)

    both.device.enter(1, Sampling(20, 0, 0.0, bad_words=((best,),), min_tokens=3), 0, PROMPT)
    assert token() == best
    both.device.flush()
    assert token() != best
    monkeypatch.setattr(torch, "empty", None)  # of the staging buffer
    both.device.flush()


def test_lists_grow_and_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "FIRST_LISTS", 128)
    both = Both()
    generator = both.generator
    largest = 0
    for _ in range(12):
        for slot in range(SLOTS):
            biased = generator.permutation(VOCAB)[: int(generator.integers(1, 200))].tolist()
            bias = tuple(
                (token, float(value)) for token, value in zip(biased, generator.normal(size=len(biased)), strict=True)
            )
            both.enter(slot, Sampling(20, 1, 1.0, logit_bias=bias, min_tokens=30))
        logits = torch.from_numpy(generator.normal(0, 3, (SLOTS, VOCAB)).astype(np.float32))
        both.sample(logits, list(range(SLOTS)), [9] * SLOTS)
        largest = max(largest, len(both.device._state.lists))
    assert SLOTS * 400 < largest <= 2 * (SLOTS * 64 + SLOTS * 128 + SLOTS * 256 + SLOTS * 512)


def test_what_no_row_uses_may_be_announced() -> None:
    """Surplus bits, as for a captured graph, change nothing."""
    both = Both()
    for slot in range(SLOTS):
        both.enter(slot, Sampling(20, slot, temperature=slot / 4))
    both.device.flush()
    rows, lengths = torch.arange(SLOTS), torch.full((SLOTS,), 12)
    logits = torch.randn(SLOTS, VOCAB, generator=torch.Generator().manual_seed(0))
    plain = both.device.sample(logits, rows, lengths, ops.DRAW, 0)
    every = both.device.sample(logits, rows, lengths, (1 << 10) - 1, 4)
    assert torch.equal(plain.tokens, every.tokens)
    assert every.policy is not None and not every.policy.any()
    assert every.logprobs is not None and not every.logprobs.ranks.any()
    assert both.device.uses_of([]) == 0 and both.device.tops_of([]) == []


def test_a_mask_holds_for_every_row() -> None:
    both = Both(3)
    for slot, temperature in enumerate((0.0, 1.0, 2.0)):
        both.enter(slot, Sampling(20, slot, temperature))
    both.device.flush()
    allowed = np.zeros((3, -(-VOCAB // 32) * 32), bool)
    allowed[:, [0, 31, 32, 299]] = True
    mask = torch.from_numpy(np.packbits(allowed, axis=-1, bitorder="little").view(np.int32))
    seen: set[int] = set()
    for length in range(PROMPT, CONTEXT):
        logits = torch.zeros(3, VOCAB)
        seen |= set(
            both.device.sample(logits, torch.arange(3), torch.full((3,), length), ops.DRAW, 0, mask).tokens.tolist()
        )
    assert seen == {0, 31, 32, 299}
