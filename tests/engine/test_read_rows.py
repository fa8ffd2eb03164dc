"""Rows of which nothing is read end with the last layer's attention: fewer are computed, and none is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import LANGUAGE_MODELS, REWARD_MODELS, write_checkpoint
from hubs import answer, generate, make_hub, prompt, score

from tandem.model.linear import Linear
from tandem.server.engine.plan import Plan, PromptRows
from tandem.server.engine.prompt_rows import Read, Rows
from tandem.server.engine.request import Request

EVERYTHING = Read(None, np.zeros(0, np.int64))


def asked(model: str, scores: bool) -> list[Request]:
    """Prompts of several chunks, one of which has all its log-probabilities told, or texts to be scored."""
    if scores:
        return [score(number, model, prompt(length, number)) for number, length in enumerate((90, 7, 33))]
    told = generate(0, model, prompt(50), max_tokens=3, logprobs=1)
    told = replace(told, want=frozenset({"tokens", "logprobs", "prompt_logprobs"}), prompt_logprobs=1)
    others = [generate(number, model, prompt(90, number), n=number, max_tokens=6, logprobs=1) for number in (1, 2)]
    return [replace(told, first_needed_row=0), *others]


@pytest.mark.parametrize("run_ahead", [False, True], ids=["waits", "ahead"])
@pytest.mark.parametrize("variant", [*LANGUAGE_MODELS, *REWARD_MODELS])
def test_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, run_ahead: bool) -> None:
    path = write_checkpoint(tmp_path / "m", variant, tokenizer=False)
    found: list[Any] = []
    for everything in (False, True):
        with monkeypatch.context() as patch:
            if everything:
                patch.setattr(Read, "of", staticmethod(lambda plan, ends, adapted: EVERYTHING))
            hub = make_hub(path, run_ahead=run_ahead, max_num_batched_tokens=64)
            answers = answer(hub, *asked("m", variant in REWARD_MODELS))
        found.append([(a.token_ids, a.logprobs.values, a.scores, a.prompt_logprobs) for a in answers])
    assert found[0] == found[1]


@pytest.mark.parametrize("run_ahead", [False, True], ids=["waits", "ahead"])
def test_a_prompts_rows_end_with_the_last_attention(tmp_path: Path, run_ahead: bool) -> None:
    path = write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False)
    hub = make_hub(path, run_ahead=run_ahead, max_num_batched_tokens=64)
    rows: dict[str, list[int]] = {"first": [], "last": []}
    layers = hub.engines[0].runner.model.decoder.layers
    for name, layer in zip(rows, layers, strict=True):
        down = layer.mlp.down_proj
        assert isinstance(down, Linear)
        down.register_forward_pre_hook(lambda module, args, name=name: rows[name].append(len(args[0])))
    answer(hub, generate(1, "m", prompt(150), max_tokens=1))
    assert rows == {"first": [64, 64, 22], "last": [1, 1, 2]}  # the first row, and that of the prompt's end


def plan(**given: Any) -> Plan:
    """A decode, a prompt's last six tokens, and four others' beginning."""
    columns = [0, 1, 2], [9, 4, 0], [1, 6, 40]
    return Plan(*columns, 1, 47, **({"samples": [(0, 0), (1, 1)]} | given))


ENDS = np.array([0, 6, 46])


def numbers(plan: Plan) -> list[int] | None:
    read = Read.of(plan, ENDS, False)
    return None if read.numbers is None else read.numbers.tolist()


def test_which_rows_are_read() -> None:
    assert numbers(plan()) == [0, 6]
    assert numbers(plan(pins=[(2, 3)], scores=[(1, 1)])) == [0, 6, 46]
    assert numbers(plan(samples=[], prompt_logprobs=[PromptRows(1, 5, 9)])) == [0, 2, 3, 4, 5]
    assert numbers(plan(samples=[], values=[PromptRows(2, 0, 2)])) == [0, 7, 8]
    assert numbers(plan(samples=[], prompt_logprobs=[PromptRows(1, 3, 6, pin=7)])) == [0, 1, 2]  # 3 was pinned before
    assert numbers(plan(pooled=[(2, False, None)])) is None
    assert numbers(plan(prompt_logprobs=[PromptRows(2, 0, 24)])) is None  # more than half
    assert Read.of(plan(), ENDS, adapted=True).numbers is None


def test_where_they_are_then() -> None:
    entries = [PromptRows(1, 3, 6, pin=7), PromptRows(2, 10, 12)]
    step = plan(prompt_logprobs=entries)
    read = Read.of(step, ENDS, False)
    assert read.numbers is not None and read.numbers.tolist() == [0, 1, 2, 6, 17, 18]
    assert read.at(ENDS[:2]).tolist() == [0, 3]
    rows = Rows.of(step, entries, ENDS, read)
    assert rows.numbers[1:].tolist() == [1, 2, 4, 5] and 0 <= rows.numbers[0] < 6
    assert rows.places.tolist() == [0] and rows.pins.tolist() == [7]
