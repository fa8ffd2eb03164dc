"""Sampling parameters by slot: each does what it says, alone and beside rows that use others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.kernels import sampling as ops
from tandem.server.engine.request import Logprobs, Sampling
from tandem.server.engine.sampler import Sampler

VOCAB, CONTEXT, PROMPT = 200, 40, 6
END = (2, 3)


def make(**given: Any) -> Sampling:
    return Sampling(**({"max_tokens": 20, "seed": 11, "temperature": 0.0} | given))


class Rows:
    """A sampler whose slot i holds a prompt, some generated tokens and the i-th parameters."""

    def __init__(self, parameters: list[Sampling], generated: int = 8) -> None:
        generator = np.random.default_rng(0)
        self.history = generator.integers(0, VOCAB, (len(parameters), CONTEXT)).astype(np.int32)
        self.sampler = Sampler(self.history, VOCAB, END)
        self.lengths = np.full(len(parameters), PROMPT + generated)
        self.logits = torch.randn(len(parameters), VOCAB, generator=torch.Generator().manual_seed(1)) * 2
        for slot, one in enumerate(parameters):
            self.sampler.enter(slot, one, slot % 3, PROMPT)

    def sample(self, slots: list[int]) -> tuple[list[int], list[Logprobs | None] | None]:
        tokens, columns = self.sampler.sample(self.logits[slots].clone(), np.array(slots), self.lengths[slots])
        return tokens.tolist(), columns


def one(logits: Tensor, history: list[int] | None = None, **given: Any) -> tuple[int, Logprobs | None]:
    """The token of a single row with prompt `history[:2]`, and its log-probabilities."""
    tokens = history or [5, 6, 7]
    array = np.array([tokens + [0] * 4], np.int32)
    sampler = Sampler(array, len(logits), END)
    sampler.enter(0, make(**given), 0, 2)
    drawn, columns = sampler.sample(logits[None].clone(), np.array([0]), np.array([len(tokens)]))
    return int(drawn[0]), columns and columns[0]


ALL = [
    make(),
    make(temperature=1.0),
    make(temperature=0.7, top_k=5),
    make(temperature=1.3, top_p=0.7, seed=2**64 - 1),
    make(temperature=1.0, min_p=0.2, logprobs=3),
    make(presence_penalty=2.0, frequency_penalty=0.5),
    make(temperature=1.0, repetition_penalty=1.8, logprobs=2, logprobs_mode="processed"),
    make(logit_bias=((9, 50.0), (10, 49.0))),
    make(temperature=1.0, allowed_ids=(4, 5, 6, 199)),
    make(temperature=1.0, bad_words=((1,), (4, 5))),
    make(temperature=1.0, min_tokens=15, stop_ids=(77,)),
    make(logprobs=0, policy_logprobs=True),
    make(logprobs=4, logprobs_mode="processed", presence_penalty=1.0),
    make(temperature=1.0, top_k=3, top_p=0.9, min_p=0.01, presence_penalty=0.3, logprobs=5, logprobs_mode="processed"),
    make(temperature=0.4, top_p=0.5, logprobs=1, policy_logprobs=True),
]


@pytest.mark.parametrize("generated", [0, 8])
def test_a_row_draws_the_same_beside_any_others(generated: int) -> None:
    rows = Rows(ALL, generated)
    tokens, columns = rows.sample(list(range(len(ALL))))
    assert columns is not None
    for slot in range(len(ALL)):
        alone, own = rows.sample([slot])
        assert alone == [tokens[slot]]
        expected = columns[slot]
        assert (own and own[0]) == expected or (own and expected and own[0].values == pytest.approx(expected.values))
    backwards, _ = rows.sample(list(reversed(range(len(ALL)))))
    assert backwards == tokens[::-1]


def test_the_seed_the_choice_and_the_position_make_the_noise() -> None:
    """Eight rows that differ in one of the three draw different tokens from one flat distribution, reproducibly."""
    flat = torch.zeros(1, VOCAB)

    def draw(seed: int, choice: int, position: int) -> int:
        sampler = Sampler(np.zeros((1, CONTEXT), np.int32), VOCAB, END)
        sampler.enter(0, make(temperature=1.0, seed=seed), choice, PROMPT)
        return int(sampler.sample(flat.clone(), np.array([0]), np.array([PROMPT + position]))[0][0])

    for variants in ([(i, 0, 0) for i in range(8)], [(1, i, 0) for i in range(8)], [(1, 0, i) for i in range(8)]):
        first = [draw(*variant) for variant in variants]
        assert first == [draw(*variant) for variant in variants]
        assert len(set(first)) > 4
    assert draw(2**63 + 1, 0, 0) != draw(1, 0, 0)  # all 64 bits count


def test_bias_allowed_ids_and_bad_words() -> None:
    logits = torch.zeros(50)
    logits[10], logits[11], logits[12] = 5.0, 4.0, 3.0
    assert one(logits)[0] == 10
    assert one(logits, logit_bias=((12, 3.0),))[0] == 12
    assert one(logits, logit_bias=((12, 1.0), (12, 2.0)))[0] == 12  # entries of one token add up
    assert one(logits, allowed_ids=(3, 12))[0] == 12
    assert one(logits, allowed_ids=(3, 12), logit_bias=((3, 9.0), (10, 99.0)))[0] == 3
    assert one(logits, bad_words=((10,),))[0] == 11
    assert one(logits, [1, 2, 7], bad_words=((7, 10),))[0] == 11
    assert one(logits, [1, 2, 8], bad_words=((7, 10),))[0] == 10
    assert one(logits, [6, 7], bad_words=((6, 7, 10),))[0] == 11  # a sequence may begin in the prompt
    assert one(logits, [6, 7], bad_words=((5, 6, 7, 10),))[0] == 10
    assert one(logits, allowed_ids=(10,), bad_words=((10,),))[0] == -1  # nothing is left


def test_no_end_and_no_stop_before_min_tokens() -> None:
    logits = torch.zeros(50)
    logits[2], logits[20], logits[30] = 9.0, 8.0, 7.0
    history = [5, 6, 7]  # two of the prompt, one generated
    assert one(logits, history)[0] == 2
    assert one(logits, history, min_tokens=1)[0] == 2
    assert one(logits, history, min_tokens=2)[0] == 20
    assert one(logits, history, min_tokens=2, stop_ids=(20,))[0] == 30
    assert one(logits, history, min_tokens=2, stop_ids=(20,), ignore_eos=True)[0] == 30


def test_penalties_see_prompt_and_answer_as_they_should() -> None:
    logits = torch.zeros(50)
    logits[10], logits[11], logits[12] = 5.0, 4.9, 4.0
    prompt_only, both = [10, 6, 7], [1, 2, 10, 11, 11]
    assert one(logits, prompt_only, presence_penalty=2.0, frequency_penalty=2.0)[0] == 10
    assert one(logits, prompt_only, repetition_penalty=1.5)[0] == 11
    assert one(logits, both, presence_penalty=0.5)[0] == 10
    assert one(logits, both, presence_penalty=2.0)[0] == 12
    assert one(logits, both, frequency_penalty=0.6)[0] == 10
    assert one(logits, both, frequency_penalty=0.01)[0] == 10
    assert one(logits, [1, 2, 10], frequency_penalty=0.5)[0] == 11


@pytest.mark.parametrize("penalty", [1e-320, 1e-38, 1e38, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 2.0])
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_no_repetition_penalty_makes_a_logit_infinite(penalty: float, temperature: float, mode: str) -> None:
    logits = torch.zeros(50)
    logits[10], logits[11], logits[12] = 30.0, 20.0, -30.0
    given: dict[str, Any] = {"temperature": temperature, "logprobs_mode": mode, "logprobs": 3, "min_p": 0.5}
    token, found = one(logits, [5, 10, 12, 0], repetition_penalty=penalty, allowed_ids=(10, 11, 12), **given)
    assert token == (10 if penalty < 1 else 11) and found is not None
    assert math.isfinite(found.values[0])


def test_logprobs_raw_and_processed() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(8))
    raw = logits.log_softmax(-1)
    token, found = one(logits, temperature=0.5, top_k=4, logprobs=6, logit_bias=((3, 1.0),))
    assert found is not None
    assert found.values[0] == pytest.approx(float(raw[token]), abs=1e-5)
    assert found.ranks == [1 + int((raw > raw[token]).sum())]
    assert found.top_ids == [raw.topk(6).indices.tolist()]
    assert found.top_values[0] == pytest.approx(raw.topk(6).values.tolist(), abs=1e-5)

    edited = logits.clone()
    edited[3] += 1.0
    kept = edited.topk(4)
    processed = (kept.values / 0.5).log_softmax(-1)
    token, found = one(logits, temperature=0.5, top_k=4, logprobs=6, logit_bias=((3, 1.0),), logprobs_mode="processed")
    assert found is not None
    place = kept.indices.tolist().index(token)
    assert found.values == pytest.approx([float(processed[place])], abs=1e-5) and found.ranks == [place + 1]
    assert found.top_ids == [kept.indices.tolist()]  # what cannot be drawn is not listed
    assert found.top_values[0] == pytest.approx(processed.tolist(), abs=1e-5)
    assert math.isclose(sum(math.exp(value) for value in found.top_values[0]), 1, abs_tol=1e-5)

    token, found = one(logits, logprobs=1, logit_bias=((3, 100.0),), logprobs_mode="processed")
    assert token == 3 and found is not None and found.values == pytest.approx([0.0], abs=1e-5)
    _, found = one(logits, logprobs=0)
    assert found is not None and found.top_ids == [[]]
    assert one(logits)[1] is None


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logprobs_of_the_policy(mode: str) -> None:
    """By the model and the temperature alone, whatever else shaped the draw."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(8))
    shape: dict[str, Any] = {"top_k": 4, "logit_bias": ((3, 1.0),), "allowed_ids": tuple(range(40)), "min_p": 0.1}
    for temperature in (0.5, 1.0, 2.5, 0.0):
        given: dict[str, Any] = {"temperature": temperature, "logprobs": 3, "logprobs_mode": mode} | shape
        token, without = one(logits, **given)
        again, found = one(logits, policy_logprobs=True, **given)
        assert found is not None and without is not None and (again, found.values) == (token, without.values)
        expected = (logits.double() / (temperature or 1)).log_softmax(-1)[token]
        assert found.policy == pytest.approx([float(expected)], abs=1e-6) and without.policy == []


def test_a_slot_forgets_who_was_there_before() -> None:
    given: dict[str, Any] = {"logprobs": 2, "presence_penalty": 2.0, "policy_logprobs": True}
    rows = Rows([make(temperature=1.0, allowed_ids=(4,), bad_words=((9,),), **given)])
    rows.sampler.enter(0, make(), 0, PROMPT)
    tokens, columns = rows.sample([0])
    assert tokens == [int(rows.logits[0].argmax())] and columns is None


def test_plain_rows_pay_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows cost an argmax; rows with a temperature alone are neither sorted nor filtered."""

    def refuse(*_: Any) -> None:
        raise AssertionError("not for these rows")

    for name in ("thresholds", "penalise"):
        monkeypatch.setattr(ops, name, refuse)
    monkeypatch.setattr("tandem.server.engine.sampler.token_logprobs", refuse)
    monkeypatch.setattr(ops, "draw", ops.draw.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
    rows = Rows([make(), make(temperature=1.0), make(temperature=0.3, top_k=VOCAB, top_p=1.0)])
    rows.sample([0, 1, 2])
    monkeypatch.setattr(ops, "gumbel_max", refuse)
    rows.sample([0, 0])
    with pytest.raises(AssertionError):
        rows.sample([1])


def test_what_is_not_finite_is_no_token() -> None:
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(20)
        logits[4] = bad
        assert one(logits)[0] == -1
        assert one(logits, temperature=1.0, top_p=0.5, logprobs=2)[0] == -1
