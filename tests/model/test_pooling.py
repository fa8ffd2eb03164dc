"""Checkpoints that embed: without a head, with one to leave out, and what sentence-transformers says beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LANGUAGE_MODELS, make_model, write_checkpoint
from paging import PagedRun
from transformers import AutoModel

from tandem.model.checkpoint import read_checkpoint
from tandem.model.config import read_config
from tandem.model.errors import CheckpointError
from tandem.model.load import load_model
from tandem.model.pooling import Pooling, read_pooling

ONE_EACH = [
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "bloom", "neox", "opt", "gptj", "gemma2", "gemma3", "phi3"),
    *("falcon", "olmo2", "starcoder2"),
]
IDS = list(range(5, 25))


@pytest.mark.parametrize("variant", ONE_EACH)
def test_decoders_without_and_with_a_head_to_leave_out(variant: str, tmp_path: Path) -> None:
    """As AutoModel reads both: the one it saved, and the language model's."""
    make_model(variant).save_pretrained(tmp_path / "lm")
    reference = AutoModel.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    reference.save_pretrained(tmp_path / "bare")
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).last_hidden_state[0]
    for model in (load_model(tmp_path / "bare"), load_model(read_checkpoint(tmp_path / "lm", head="embed"))):
        assert model.config.pooling == Pooling("last", True) and not model.config.generates
        torch.testing.assert_close(PagedRun(model, 1, 64).step({0: IDS})[0], expected, rtol=1e-4, atol=1e-4)


def test_one_of_each_family_is_tested() -> None:
    from tandem.model.registry import FAMILIES

    named = {LANGUAGE_MODELS[variant][0] for variant in ONE_EACH}
    assert {name for name in FAMILIES if any(one.startswith(name) for one in named)} == set(FAMILIES)


def write_modules(path: Path, *kinds: str, pooling: dict[str, Any] | None = None) -> None:
    prefix = "sentence_transformers.models."
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if kind == "Transformer" else f"{index}_{kind}",
            "type": prefix + kind,
        }
        for index, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (path / "1_Pooling").mkdir(exist_ok=True)
        (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | pooling))


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_what_sentence_transformers_says(tmp_path: Path, pooling: dict[str, Any], mode: str) -> None:
    assert read_pooling(tmp_path) == Pooling("last", True)
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling=pooling)
    assert read_pooling(tmp_path) == Pooling(mode, True)  # type: ignore[arg-type]
    assert read_pooling(tmp_path, "cls") == Pooling("cls", True)
    write_modules(tmp_path, "Transformer", "Pooling")
    assert read_pooling(tmp_path) == Pooling(mode, False)  # type: ignore[arg-type]


def test_modules_make_an_embedding_model_of_a_language_model(tmp_path: Path) -> None:
    from tandem.server.engine.hub import Hub
    from tandem.server.engine.options import EngineOptions, ModelSpec

    path = write_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
    write_modules(path, "Transformer", "Pooling", pooling={"pooling_mode_mean_tokens": True})
    options = EngineOptions(kv_cache_memory_bytes=16 << 20)
    card = Hub.load([ModelSpec("model", str(path))], options).engines[0].card
    assert (card.role, card.pooling, card.normalized) == ("embedding", "mean", False)
    assert Hub.load([ModelSpec("model", str(path), "policy")], options).engines[0].card.role == "policy"


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is true"),
        (("Transformer", "Pooling"), {}, "no pooling_mode"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pooling_mode_mean_tokens and pooling_mode_cls_token is true",
        ),
        (("Transformer", "Pooling"), {"pooling_mode": "max"}, 'pooling_mode is "max"'),
        (("Transformer", "Pooling", "Dense"), {"pooling_mode": "mean"}, "module Dense is not supported"),
    ],
)
def test_what_cannot_be_pooled_is_named(
    tmp_path: Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    write_modules(tmp_path, *kinds, pooling=pooling)
    with pytest.raises(CheckpointError, match=message):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text('{"type": 1}')
    with pytest.raises(CheckpointError, match=r"modules\.json must list modules"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("field", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_encoders_are_refused(tmp_path: Path, field: dict[str, bool]) -> None:
    path = write_checkpoint(tmp_path / "model", "gemma2", tokenizer=False)
    config = json.loads((path / "config.json").read_text()) | field
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=next(iter(field))):
        read_config(path, embedding=True)
