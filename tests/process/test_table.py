"""The table of a start says what each model is and whose weights it has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.server.cli import _announce
from tandem.server.engine.control import HostedModel, Ready
from tandem.server.engine.process import shown_head
from tandem.server.engine.request import ModelCard, Role


def card(role: Role, head: str = "", pooling: str = "", labels: int = 0) -> ModelCard:
    common = {"path": "", "architecture": "LlamaForCausalLM", "dtype": "float32", "context": 512, "vocab_size": 320}
    more = {"end_ids": (), "weight_version": 0, "created": 0}
    return ModelCard("m", role, labels=labels, head=head, pooling=pooling, **common, **more)  # type: ignore[arg-type]


def test_heads_in_words() -> None:
    assert shown_head(card("policy")) == ""
    assert shown_head(card("reward", "v_head", "before_first_pad", 1)) == "v_head, before_first_pad"
    assert shown_head(card("value", "TRL v_head", "", 1)) == "TRL v_head, every token"


def test_precision_in_words() -> None:
    policy, judge = card("policy"), card("reward", "score", "last", 1)
    assert policy.precision == replace(policy, kv_dtype="float32").precision == "float32"
    narrow = {"quantization": "int8", "kv_dtype": "int8"}
    assert replace(policy, lm_head="int8", **narrow).precision == "float32, weights int8, KV int8"
    assert replace(policy, **narrow).precision == "float32, weights int8, head not, KV int8"
    assert replace(policy, lm_head="int8").precision == "float32, head int8"
    assert replace(judge, quantization="w8a8").precision == "float32, weights w8a8"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, role: str, head: str, shares: str, weights: int) -> HostedModel:
        return HostedModel(
            name, role, "LlamaForCausalLM", head, shares, "float32", 512, weights, 10, 160, 1 << 20, 160, ""
        )

    models = (
        row("judge", "reward", "score, last", "", 40 << 20),
        row("critic", "value", "score, every token", "judge", 0),
    )
    _announce(Ready(models, "all is divided"), "127.0.0.1", 8000)
    lines = capsys.readouterr().out.splitlines()
    judge, critic = (next(line for line in lines if name in line) for name in ("judge", "critic"))
    assert "score, last" in judge and "40.0" in judge
    assert "value" in critic and "score, every token" in critic and "0.0 + judge's" in critic
