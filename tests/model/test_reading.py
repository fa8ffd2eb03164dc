"""Texts that are read through a model at once, against transformers and against each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import write_checkpoint

from tandem.model.load import load_model
from tandem.model.reading import PAGE, read_texts


@pytest.mark.parametrize("variant", ["llama-gqa", "gpt2"])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    path = write_checkpoint(tmp_path, variant, tokenizer=False)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (size,), generator=draw).tolist() for size in (1, PAGE - 1, PAGE, PAGE + 5)]
    model = load_model(path, dtype="float32", deterministic=True)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    found = read_texts(model, texts)
    for ids, hidden in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(model.logits(hidden), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(hidden, read_texts(model, [ids])[0])


def test_what_the_cache_keeps_is_what_is_read(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path, "llama-gqa", tokenizer=False), dtype="float32")
    exact, rounded = (read_texts(model, [list(range(3, 40))], dtype)[0] for dtype in (None, torch.int8))
    assert 1e-4 < float((exact - rounded).abs().max()) < 0.2
