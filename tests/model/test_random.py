"""Models with random weights: every tensor is drawn, the same seed draws the same, and their text varies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from tandem.model.config import read_config
from tandem.model.load import random_model
from tandem.model.weights import slots_of


@pytest.mark.parametrize("variant", ["gpt2", "llama-tied", "qwen2", "bloom", "llama-reward"])
def test_every_tensor_is_drawn(tmp_path: Path, variant: str) -> None:
    config = read_config(write_checkpoint(tmp_path, variant, tokenizer=False))
    models = [random_model(config, dtype="float32", seed=seed) for seed in (1, 1, 2)]
    parts = [[slot for part in (m.decoder, m.head) for slot in slots_of(part)] for m in models]
    for one, same, other in zip(*parts, strict=True):
        assert torch.equal(one.into, same.into), one.name
        if one.optional:  # what a checkpoint may leave out
            continue
        assert not torch.equal(one.into, other.into), one.name
        if one.into.dim() > 1:
            assert one.into.std() == pytest.approx(one.into.shape[1] ** -0.5, rel=0.2), one.name
        else:
            assert (one.into - float(one.name.endswith("weight"))).abs().max() < 0.6, one.name
    assert models[0].digest == models[1].digest != models[2].digest
