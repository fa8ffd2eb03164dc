"""The policy's log-probabilities: the same whether tokens are drawn or evaluated, whatever else shaped the draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from hubs import answer, generate, make_hub, prompt

from tandem.server.engine.request import Request

PROMPT = prompt(33)
SHAPED: list[dict[str, Any]] = [
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "logprobs": 2, "logprobs_mode": "processed"},
    {"temperature": 1.7, "repetition_penalty": 1.3, "logit_bias": ((9, 4.0),), "logprobs": 0},
    {"temperature": 0.0, "logprobs": 1, "logprobs_mode": "processed", "bad_words": ((7,),)},
    {"temperature": 0.9, "allowed_ids": tuple(range(3, 60)), "logprobs": 0, "logprobs_mode": "processed"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "llama-gqa", "llama-gqa", tokenizer=False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_drawing_and_evaluating_agree(checkpoint: Path, ahead: bool, deterministic: bool) -> None:
    hub = make_hub(checkpoint, run_ahead=ahead, deterministic=deterministic, max_num_batched_tokens=50)
    plain = [generate(number, "llama-gqa", PROMPT, seed=number, **given) for number, given in enumerate(SHAPED)]
    asked = [
        generate(number + 10, "llama-gqa", PROMPT, seed=number, policy_logprobs=True, **given)
        for number, given in enumerate(SHAPED)
    ]
    drawn = answer(hub, *plain, *asked)
    for number, (before, one) in enumerate(zip(drawn, drawn[len(plain) :], strict=False)):
        assert one.token_ids == before.token_ids and one.logprobs.values == before.logprobs.values
        assert before.logprobs.policy == [] and len(one.logprobs.policy) == len(one.token_ids)
        evaluation = Request(
            number,
            "llama-gqa",
            PROMPT + one.token_ids,
            None,
            frozenset({"prompt_logprobs"}),
            prompt_logprobs=0,
            first_needed_row=len(PROMPT) - 1,
            temperature=SHAPED[number]["temperature"],
        )
        evaluated = answer(hub, evaluation)[0].prompt_logprobs
        assert evaluated is not None
        if deterministic:
            assert one.logprobs.policy == evaluated.values
        else:
            assert one.logprobs.policy == pytest.approx(evaluated.values, abs=1e-5)
    assert drawn[5].logprobs.policy == drawn[5].logprobs.values  # nothing but the model and a temperature of 1
    assert drawn[6].logprobs.policy != drawn[6].logprobs.values


def test_they_come_beside_others_only(checkpoint: Path) -> None:
    hub = make_hub(checkpoint)
    (output,) = hub.submit(generate(1, "llama-gqa", PROMPT, policy_logprobs=True))
    assert output.error is not None and (output.error.kind, output.error.param) == ("invalid", "logprobs")
