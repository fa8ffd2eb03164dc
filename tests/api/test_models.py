"""What /v1/models says of models that judge, and of what models are kept in."""

from __future__ import annotations

from dataclasses import replace

from tandem.server.api.models import shown
from tandem.server.engine.request import ModelCard

JUDGE = ModelCard(
    *("judge", "reward", "", "LlamaForSequenceClassification", "float32", 512, 320, (2,), 1, 0, 0),
    pooling="last",
    head="OpenRLHF score",
    reward_mean=0.5,
    reward_std=2.0,
    fingerprint="abc",
)


def test_a_reward_model_says_its_head_and_scale() -> None:
    about = shown(JUDGE)
    assert (about["head"], about["labels"], about["pooling"]) == ("OpenRLHF score", 1, "last")
    assert (about["reward_mean"], about["reward_std"], about["tokenizer_fingerprint"]) == (0.5, 2.0, "abc")
    assert "shares" not in about and "sampling_defaults" not in about


def test_a_model_says_what_it_is_kept_in() -> None:
    about = shown(JUDGE)
    assert (about["dtype"], about["quantization"], about["kv_cache_dtype"]) == ("float32", None, "float32")
    about = shown(replace(JUDGE, quantization="int8", kv_dtype="int8"))
    assert (about["quantization"], about["kv_cache_dtype"]) == ("int8", "int8")


def test_a_value_model_says_whose_decoder_it_has() -> None:
    about = shown(replace(JUDGE, name="critic", role="value", pooling="", shares="judge"))
    assert (about["role"], about["head"], about["shares"]) == ("value", "OpenRLHF score", "judge")
    assert "pooling" not in about and "reward_mean" not in about
