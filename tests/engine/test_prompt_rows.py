"""What the head is given for a prompt's log-probabilities: never logits of the whole prompt at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB, make_model, write_checkpoint
from hubs import answer, generate, make_hub, prompt
from torch import Tensor

from tandem.kernels import ops

ROWS = 8  # of logits at once
LENGTH = 203


@pytest.mark.parametrize("run_ahead", [False, True])
def test_logits_of_a_prompt_exist_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    monkeypatch.setattr(ops, "LOGIT_ELEMENTS", ROWS * VOCAB)
    path = write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False)
    hub = make_hub(path, run_ahead=run_ahead, max_num_batched_tokens=1024)
    head = hub.engines[0].runner.model.head.lm_head
    given: list[int] = []
    seen: list[int] = []  # elements of everything that is as wide as the vocabulary
    head.register_forward_pre_hook(lambda module, args: given.append(args[0].shape[0]))
    plain = ops.token_logprobs

    def counted(logits: Tensor, targets: Tensor, top: int, factors: Tensor | None = None) -> ops.TokenLogprobs:
        seen.append(logits.numel())
        return plain(logits, targets, top, factors)

    monkeypatch.setattr(ops, "token_logprobs", counted)
    ids = prompt(LENGTH)
    want = frozenset({"tokens", "logprobs", "prompt_logprobs"})
    asked = generate(1, "m", ids, max_tokens=1, logprobs=1)
    found = answer(hub, replace(asked, want=want, prompt_logprobs=1, first_needed_row=0))[0]
    assert max(given) == ROWS and sum(given) == LENGTH - 1 + 1  # every row once, and the last for the draw
    assert max(seen) <= ROWS * VOCAB
    with torch.inference_mode():
        expected = make_model("llama-gqa")(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = expected[torch.arange(LENGTH - 1), torch.tensor(ids[1:])]
    assert found.prompt_logprobs is not None
    assert found.prompt_logprobs.values == pytest.approx(own.tolist(), abs=1e-4)
