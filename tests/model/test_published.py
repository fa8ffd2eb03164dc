"""The configs of published checkpoints, as far as Tandem reads them: sizes, and what is easily read wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tandem.model.config import read_config
from tandem.model.rotary import Rope

# Checkpoint -> architecture, fields of its config.json.
PUBLISHED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "pythia-70m": (
        "GPTNeoXForCausalLM",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
        | {"vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000}
        | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False}
        | {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float16"},
    ),
    "opt-350m": (
        "OPTForCausalLM",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096, "vocab_size": 50272}
        | {"max_position_embeddings": 2048, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
        | {"activation_function": "relu", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "prefix": "</s>"}
        | {"torch_dtype": "float16"},
    ),
    "gpt-j-6b": (
        "GPTJForCausalLM",
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "n_inner": None, "rotary_dim": 64}
        | {"vocab_size": 50400, "activation_function": "gelu_new", "rotary": True, "scale_attn_weights": True}
        | {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "eos_token_id": 50256},
    ),
    "gemma-2-2b-it": (
        "Gemma2ForCausalLM",
        {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000, "max_position_embeddings": 8192}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
        | {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "eos_token_id": [1, 107], "torch_dtype": "bfloat16"}
        | {"cache_implementation": "hybrid", "attention_bias": False},
    ),
    "gemma-3-1b-it": (
        "Gemma3ForCausalLM",
        {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144, "max_position_embeddings": 32768}
        | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "sliding_window": 512, "sliding_window_pattern": 6, "rope_scaling": None}
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "eos_token_id": [1, 106], "torch_dtype": "bfloat16"},
    ),
    "gemma-3-4b-it": (
        "Gemma3ForConditionalGeneration",
        {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "mm_tokens_per_image": 256, "vision_config": {}}
        | {
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
            | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
        },
    ),
    "Phi-3-mini-4k-instruct": (
        "Phi3ForCausalLM",
        {"hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 4096, "sliding_window": 2047}
        | {"original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0, "hidden_act": "silu"}
        | {"tie_word_embeddings": False, "eos_token_id": 32000, "attention_bias": False, "torch_dtype": "bfloat16"},
    ),
    "Phi-3-mini-128k-instruct": (
        "Phi3ForCausalLM",
        {"hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 131072, "sliding_window": 262144}
        | {"original_max_position_embeddings": 4096, "rope_theta": 10000.0, "hidden_act": "silu"}
        | {"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48}},
    ),
    "Phi-4-mini-instruct": (
        "Phi3ForCausalLM",
        {"hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"intermediate_size": 8192, "vocab_size": 200064, "max_position_embeddings": 131072}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48}}
        | {"sliding_window": 262144, "lm_head_bias": False, "mlp_bias": False},
    ),
    "falcon-7b": (
        "FalconForCausalLM",
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024}
        | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False}
        | {"layer_norm_epsilon": 1e-5, "eos_token_id": 11, "torch_dtype": "bfloat16"},
    ),
    "falcon-40b": (
        "FalconForCausalLM",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
        | {"vocab_size": 65024, "parallel_attn": True, "new_decoder_architecture": True, "alibi": False, "bias": False},
    ),
    "falcon-11B": (
        "FalconForCausalLM",
        {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "num_kv_heads": 8}
        | {"vocab_size": 65024, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ff_factor": 4}
        | {"ffn_hidden_size": 16384, "max_position_embeddings": 8192, "rope_theta": 500042.0, "activation": "gelu"}
        | {"tie_word_embeddings": False, "parallel_attn": True},
    ),
    "falcon-rw-1b": (
        "FalconForCausalLM",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50304, "alibi": True}
        | {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "bias": True},
    ),
    "OLMo-2-1124-7B": (
        "Olmo2ForCausalLM",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"intermediate_size": 11008, "vocab_size": 100352, "max_position_embeddings": 4096, "rope_theta": 500000}
        | {"rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu"},
    ),
    "starcoder2-3b": (
        "Starcoder2ForCausalLM",
        {"hidden_size": 3072, "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2}
        | {"intermediate_size": 12288, "vocab_size": 49152, "max_position_embeddings": 16384, "sliding_window": 4096}
        | {"rope_theta": 999999.4420358813, "norm_epsilon": 1e-5, "use_bias": True, "norm_type": "layer_norm"}
        | {"mlp_type": "default", "hidden_act": "gelu_pytorch_tanh"},
    ),
}


def of(tmp_path: Path, name: str) -> dict[str, Any]:
    architecture, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **fields}))
    config = read_config(tmp_path)
    return {field: getattr(config, field) for field in config.__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pythia-70m", {"rope": Rope(rotary_size=16), "end_ids": (0,), "parallel": True, "tied": False}),
        ("opt-350m", {"embedding_size": 512, "norm_first": False, "final_norm": False, "tied": True}),
        ("gpt-j-6b", {"rope": Rope(rotary_size=64), "head_bias": True, "intermediate_size": 16384}),
        ("gemma-2-2b-it", {"windows": (4096, None) * 13, "tied": True, "end_ids": (1, 107), "logit_softcap": 30.0}),
        (
            "gemma-3-1b-it",
            {"windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2, "rope": Rope("default", 1e6, 256), "end_ids": (1, 106)}
            | {"local_rope": Rope("default", 1e4, 256), "logit_softcap": None, "tied": True, "kv_heads": 1},
        ),
        (
            "gemma-3-4b-it",
            {"heads": 8, "kv_heads": 4, "head_size": 256, "vocab_size": 262208, "context": 131072, "end_ids": (1, 106)}
            | {"rope": Rope("linear", 1e6, 256, 8.0, 131072), "tied": True, "dtype": "bfloat16", "norm_eps": 1e-6},
        ),
        ("Phi-3-mini-4k-instruct", {"windows": (2047,) * 32, "context": 4096, "rope": Rope(rotary_size=96)}),
        ("Phi-3-mini-128k-instruct", {"context": 131072}),
        ("Phi-4-mini-instruct", {"context": 131072, "tied": True, "head_size": 128}),
        ("falcon-7b", {"kv_heads": 1, "head_size": 64, "intermediate_size": 18176, "tied": True, "parallel_norms": 1}),
        ("falcon-40b", {"kv_heads": 8, "head_size": 64, "parallel_norms": 2}),
        ("falcon-11B", {"kv_heads": 8, "head_size": 128, "parallel_norms": 1, "tied": False, "context": 8192}),
        ("falcon-rw-1b", {"kv_heads": 32, "rope": None, "alibi": True, "parallel": False, "mlp_bias": True}),
        ("OLMo-2-1124-7B", {"rope": Rope("default", 5e5, 128), "norm_eps": 1e-6, "tied": False}),
        ("starcoder2-3b", {"windows": (4096,) * 30, "tied": True, "mlp_bias": True}),
    ],
)  # fmt: skip
def test_sizes_and_choices(tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    found = of(tmp_path, name)
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize("name", ["Phi-3-mini-128k-instruct", "Phi-4-mini-instruct"])
def test_longrope_of_phi(tmp_path: Path, name: str) -> None:
    rope = of(tmp_path, name)["rope"]
    assert (rope.type, rope.rotary_size, rope.original_context, rope.factor) == ("longrope", 96, 4096, 32.0)
    assert rope.attention_factor == pytest.approx(1.1902380714238083)
    assert rope.factors[0] == 2.0 and rope.within(4096).factors[0] == 1.0
