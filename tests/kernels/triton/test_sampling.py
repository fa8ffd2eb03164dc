"""The draw on the device against the definition: the same token for the same logits, parameters, seed and position.

Sums are taken in another order, so a draw, or a limit of top-p, that hangs on the last bit may come out otherwise; none
of the fixed cases here does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from closeness import DEVICE, DTYPES, framed, poisoned_memory
from torch import Tensor

from tandem.kernels import sampling as definition
from tandem.kernels.sampling import Drawn, Slots
from tandem.kernels.triton import sample
from tandem.kernels.triton.sampling_row import exponential
from tandem.server.engine.device_sampler import DeviceSampler
from tandem.server.engine.request import Sampling

PROMPT, CONTEXT = 3, 70
MANY = pytest.param(30_011, id="30011")


class Step:
    """Rows that draw by these parameters, each in a slot of its own, and what surrounds them."""

    def __init__(
        self, vocab_size: int, parameters: list[dict[str, Any]], seed: int = 0, mask: Tensor | None = None
    ) -> None:
        count = len(parameters)
        generator = np.random.default_rng(seed)
        history = torch.from_numpy(generator.integers(0, vocab_size, (count + 1, CONTEXT)).astype(np.int32))
        sampler = DeviceSampler(history, vocab_size, (2 % vocab_size,), "cpu")
        for slot, given in enumerate(parameters, 1):
            sampler.enter(slot, Sampling(**({"max_tokens": 9, "seed": 77 * slot} | given)), slot % 3, PROMPT)
        sampler.flush()
        self.state = sampler._state
        self.uses = sampler.uses_of(range(count + 1))
        self.slots = torch.arange(count, 0, -1)  # the last slot first
        self.lengths = torch.from_numpy(generator.integers(PROMPT, CONTEXT, count))
        self.mask = mask

    def definition(self, logits: Tensor) -> Drawn:
        return definition.sample(logits.cpu(), self.slots, self.lengths, self.state, self.uses, self.mask)

    def kernels(self, logits: Tensor) -> Drawn:
        state = Slots(*(tensor.to(DEVICE) for tensor in self.state))
        mask = None if self.mask is None else self.mask.to(DEVICE)
        before = logits.clone()
        with poisoned_memory():
            drawn = sample(logits, self.slots.to(DEVICE), self.lengths.to(DEVICE), state, self.uses, mask)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        return Drawn(drawn.tokens.cpu(), drawn.shown.cpu())

    def check(self, logits: Tensor) -> Drawn:
        expected, found = self.definition(logits), self.kernels(logits)
        assert found.tokens.tolist() == expected.tokens.tolist()
        fine = expected.tokens >= 0
        torch.testing.assert_close(found.shown[fine].float(), expected.shown[fine].float(), rtol=1e-5, atol=1e-5)
        return found


def normal(
    rows: int, vocab_size: int, spread: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return framed(logits.to(dtype).to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 5000])
def test_greedy_and_temperature(vocab_size: int, dtype: torch.dtype) -> None:
    temperatures = [0.0, 1.0, 0.01, 2.0, 1e-5, 0.0, 0.7, 1.0]
    step = Step(vocab_size, [{"temperature": temperature} for temperature in temperatures])
    for seed in range(3):
        found = step.check(normal(8, vocab_size, seed=seed, dtype=dtype))
        assert found.shown.dtype == dtype


@triton.jit
def _noise_kernel(out, columns, slot, position, BLOCK: tl.constexpr):
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + word, exponential(word, columns, slot, position))


@pytest.mark.parametrize(("seed", "choice", "position"), [(0, 0, 0), (2**64 - 1, 5, 3), (2**63 + 12345, 127, 100_000)])
def test_the_noise_is_the_definitions(seed: int, choice: int, position: int) -> None:
    """To four units in the last place over 65,536 words, the smallest ones, which win draws, as well."""
    columns = np.zeros((2, definition.COLUMNS), np.int32)
    columns[1, definition.SEED : definition.SEED_HIGH + 1] = np.array([seed], np.uint64).view(np.int32)
    columns[1, definition.CHOICE] = choice
    found = torch.full((65_536,), torch.nan, device=DEVICE)
    _noise_kernel[(4,)](found, torch.from_numpy(columns).to(DEVICE), 1, position, 16_384)
    given = (np.array([value], np.uint64) for value in (seed, choice, position))
    expected = definition.draws(*given, (65_536 - definition.LANES) * definition.LANES)[0]
    assert float(((found.cpu() - expected) / expected).abs().max()) < 5e-7


def test_hundreds_of_draws_are_the_definitions() -> None:
    """Flat and peaked rows, at every position of answers, with seeds of 64 bits."""
    rows, vocab_size = 150, 700
    wide = [{"temperature": 0.3 + i % 8 / 4, "seed": 2**63 + 12345678901234567 * i} for i in range(rows)]
    for seed in range(2):
        step = Step(vocab_size, wide, seed)
        step.check(normal(rows, vocab_size, 0.1 + 3 * seed, seed))


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40, "temperature": 0.5},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.5},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 200, "top_p": 0.99, "min_p": 1e-4},
    {},
    {"temperature": 0.0, "top_k": 3},
    {"top_k": 3, "temperature": 1e-5},
    {"top_k": 2, "top_p": 0.3},
    {"top_k": 10**9, "top_p": 0.8},
]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", [3, 900, 3000])
def test_filters(vocab_size: int, spread: float) -> None:
    """What is kept, not only what is drawn: the processed logits are compared, too."""
    for mode in ("raw", "processed"):
        step = Step(vocab_size, [one | {"logprobs": 0, "logprobs_mode": mode} for one in FILTERS])
        step.check(normal(len(FILTERS), vocab_size, spread, seed=vocab_size))


@pytest.mark.parametrize("vocab_size", [900, 3000])
def test_equals_stay_or_go_together(vocab_size: int) -> None:
    """Few distinct values, thousands of equals: more than are gathered. All equal: every token is kept."""
    step = Step(vocab_size, [one | {"logprobs": 0, "logprobs_mode": "processed"} for one in FILTERS])
    coarse = normal(len(FILTERS), vocab_size, 1.0, seed=3).mul(2).round().div(2)
    for logits in (coarse, torch.full_like(coarse, 0.25)):
        step.check(logits)


@pytest.mark.parametrize("vocab_size", [900, 3000])
def test_filters_where_few_tokens_are_left(vocab_size: int) -> None:
    given = {"allowed_ids": (0, 5, 130, vocab_size - 1), "logprobs": 0, "logprobs_mode": "processed"}
    step = Step(vocab_size, [one | given for one in FILTERS])
    step.check(normal(len(FILTERS), vocab_size, 2.0, seed=4))


def edits(vocab_size: int) -> list[dict[str, Any]]:
    last = vocab_size - 1
    many = np.random.default_rng(1).permutation(vocab_size)[: vocab_size // 2].tolist()
    return [
        {"logit_bias": ((0, 9.0), (last, 8.5), (last // 2, 8.0), (last, 0.5))},
        {"logit_bias": tuple((token, token % 7 - 3.0) for token in many)},
        {"allowed_ids": (0, 31 % vocab_size, 32 % vocab_size, last)},
        {"bad_words": tuple((token,) for token in range(0, vocab_size, 2))[:200]},
        {"min_tokens": 1000, "stop_ids": tuple(range(min(vocab_size - 1, 300)))},
        {"min_tokens": 1, "stop_ids": (1,), "temperature": 0.0},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": -0.7, "temperature": 0.0},
        {"frequency_penalty": 2.0, "repetition_penalty": 0.5, "logit_bias": ((3 % vocab_size, 4.0),)},
        {"top_k": 3, "top_p": 0.9, "presence_penalty": -2.0, "bad_words": ((last,),)},
        {"temperature": 0.0},
        {"top_p": 0.8},
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 129, 3000])
def test_edits(vocab_size: int, dtype: torch.dtype) -> None:
    parameters = edits(vocab_size)
    modes: list[dict[str, Any]] = [{"logprobs": 0, "logprobs_mode": mode} for mode in ("raw", "processed")]
    step = Step(
        vocab_size, [one | modes[i % 2] for i, one in enumerate(parameters)] + [one | modes[1] for one in parameters]
    )
    for seed in range(2):
        step.check(normal(2 * len(parameters), vocab_size, 1.0, seed, dtype=dtype))
    bare = Step(vocab_size, parameters)
    bare.check(normal(len(parameters), vocab_size, 1.0, 9, dtype=dtype))


def test_each_edit_alone() -> None:
    """A step launches what its uses name and no more."""
    for one in edits(300):
        Step(300, [one, {}]).check(normal(2, 300, 1.0))


def test_bad_words_of_several_tokens() -> None:
    words = ((4, 5, 50), (5, 60), (9, 9, 9, 9, 70), (80,), (1, 2, 90), tuple(range(20, 60)))
    step = Step(100, [{"temperature": 0.0, "bad_words": words}] * 5)
    for row, tail in enumerate([(4, 5), (3, 5), (9, 9, 9, 9), (2,), tuple(range(20, 59))]):
        slot, length = int(step.slots[row]), 45
        step.lengths[row] = length
        step.state.history[slot, length - len(tail) : length] = torch.tensor(tail, dtype=torch.int32)
    step.lengths[3] = 1
    step.state.history[int(step.slots[3]), 0] = 2  # shorter than the prefix (1, 2), which spans two slots' tokens
    step.state.history[int(step.slots[3]) - 1, -1] = 1
    logits = normal(5, 100)
    for last in (50, 60, 70, 80, 90, 59):
        logits[:, last] = 50.0 + last
    found = step.check(logits)
    assert found.tokens.tolist() == [90, 90, 90, 90, 90]
    logits[:, 90] = 0.0
    assert step.check(logits).tokens.tolist() == [70, 70, 60, 70, 70]


def test_a_mask_of_bits() -> None:
    vocab_size, rows = 1000, 6
    generator = np.random.default_rng(5)
    words = generator.integers(-(2**31), 2**31, (rows, -(-vocab_size // 32))).astype(np.int32)
    words[3], words[4] = -1, 0
    parameters = [
        {},
        {"temperature": 0.0},
        {"top_k": 4},
        {"top_p": 0.9},
        {},
        {"presence_penalty": 1.0, "logit_bias": ((7, 9.0),)},
    ]
    found = Step(vocab_size, parameters, mask=torch.from_numpy(words)).check(normal(rows, vocab_size))
    assert found.tokens.tolist()[4] == -1
    allowed = definition.bits(torch.from_numpy(words), vocab_size)
    assert all(allowed[row, token] for row, token in enumerate(found.tokens.tolist()) if row != 4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, where the device makes a NaN silently
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_no_token(bad: float) -> None:
    parameters: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5, "logprobs": 0, "logprobs_mode": "processed"},
        {"presence_penalty": 1.0}, {"temperature": 0.0},
    ]  # fmt: skip
    logits = normal(len(parameters), 400)
    logits[:-1, 140] = bad
    if bad == -torch.inf:
        logits[:-1] = bad
    assert Step(400, parameters).check(logits).tokens[:-1].tolist() == [-1] * (len(parameters) - 1)


def test_the_same_beside_any_rows_and_with_surplus_uses() -> None:
    parameters = [one | {"logprobs": 0} for one in (*FILTERS[:10], *edits(2000))]
    step, logits = Step(2000, parameters), normal(len(parameters), 2000)
    together = step.kernels(logits).tokens.tolist()
    step.uses = (1 << 10) - 1
    assert step.kernels(logits).tokens.tolist() == together
    slots, lengths = step.slots, step.lengths
    for row in range(0, len(parameters), 5):
        step.slots, step.lengths = slots[row : row + 1], lengths[row : row + 1]
        assert step.kernels(logits[row : row + 1]).tokens.tolist() == together[row : row + 1]


def test_no_rows() -> None:
    step = Step(40, [])
    assert step.kernels(normal(1, 40)[:0]).tokens.shape == (0,)


@pytest.mark.parametrize("vocab_size", [MANY])
def test_a_large_vocabulary(vocab_size: int) -> None:
    parameters = [{}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}, {"top_k": 5000, "temperature": 2.0}]
    step = Step(vocab_size, [one | {"logprobs": 0, "logprobs_mode": "processed"} for one in parameters])
    for spread in (0.5, 3.0):
        step.check(normal(len(parameters), vocab_size, spread))
