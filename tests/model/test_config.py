"""Reading config.json: aliases, old and new forms, defaults of transformers, and every refusal by field and value."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOOM, FALCON, GEMMA, GPT2, GPTJ, LLAMA, NEOX, OPT, PHI3

from tandem.model.bloom import alibi_slopes
from tandem.model.config import ModelConfig, read_config
from tandem.model.errors import CheckpointError
from tandem.model.registry import ARCHITECTURES
from tandem.model.rotary import Rope, tables

LLAMA_FIELDS = {"architectures": ["LlamaForCausalLM"], **LLAMA}
GPT2_FIELDS = {"architectures": ["GPT2LMHeadModel"], **GPT2}
BLOOM_FIELDS = {"architectures": ["BloomForCausalLM"], **BLOOM}
FALCON_FIELDS = {"architectures": ["FalconForCausalLM"], **FALCON}
GPTJ_FIELDS = {"architectures": ["GPTJForCausalLM"], **GPTJ}
NEOX_FIELDS = {"architectures": ["GPTNeoXForCausalLM"], **NEOX}
OPT_FIELDS = {"architectures": ["OPTForCausalLM"], **OPT}
PHI3_FIELDS = {"architectures": ["Phi3ForCausalLM"], **PHI3}
GEMMA2_FIELDS = {"architectures": ["Gemma2ForCausalLM"], **GEMMA}
GEMMA3_FIELDS = {"architectures": ["Gemma3ForCausalLM"], **GEMMA}
MISTRAL, QWEN2, QWEN3 = ({"architectures": [f"{name}ForCausalLM"]} for name in ("Mistral", "Qwen2", "Qwen3"))


def read(path: Path, fields: dict[str, Any], **more: Any) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(fields | more))
    return read_config(path)


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (LLAMA_FIELDS, {"architectures": ["MambaForCausalLM"]}, 'is ["MambaForCausalLM"]; supported: one of'),
        (LLAMA_FIELDS, {"architectures": None}, "architectures is null"),
        (LLAMA_FIELDS, {"architectures": "LlamaForCausalLM"}, "a list of strings"),
        (LLAMA_FIELDS, {"hidden_act": "relu"}, "hidden_act is \"relu\"; supported: 'silu' or 'swish'"),
        (LLAMA_FIELDS, {"hidden_size": None}, "hidden_size is null"),
        (LLAMA_FIELDS, {"hidden_size": "64"}, 'hidden_size is "64"; supported: a whole number'),
        (LLAMA_FIELDS, {"vocab_size": 0}, "vocab_size is 0"),
        (LLAMA_FIELDS, {"num_hidden_layers": True}, "num_hidden_layers is true"),
        (LLAMA_FIELDS, {"num_attention_heads": 7}, "num_attention_heads is 7; supported: a divisor of hidden_size 64"),
        (LLAMA_FIELDS, {"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor of num_attention"),
        (LLAMA_FIELDS, {"head_dim": 15}, "head_dim is 15"),
        (LLAMA_FIELDS, {"rms_norm_eps": "small"}, 'rms_norm_eps is "small"'),
        (LLAMA_FIELDS, {"attention_bias": 1}, "attention_bias is 1"),
        (LLAMA_FIELDS, {"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"'),
        (LLAMA_FIELDS, {"dtype": "float8_e4m3fn"}, 'dtype is "float8_e4m3fn"'),
        (LLAMA_FIELDS, {"torch_dtype": "int8"}, 'torch_dtype is "int8"'),
        (LLAMA_FIELDS, {"quantization_config": {"quant_method": "gptq"}}, 'quantization_config.quant_method is "gptq"'),
        (LLAMA_FIELDS, {"is_encoder_decoder": True}, "is_encoder_decoder is true"),
        (LLAMA_FIELDS, {"eos_token_id": [1, -2]}, "eos_token_id is [1, -2]"),
        (LLAMA_FIELDS, {"eos_token_id": "</s>"}, 'eos_token_id is "</s>"'),
        (LLAMA_FIELDS, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA_FIELDS, {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
        (LLAMA_FIELDS, {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_scaling.long_factor is missing"),
        (LLAMA_FIELDS, {"rope_scaling": {"type": "proportional"}}, 'rope_scaling.type is "proportional"'),
        (LLAMA_FIELDS, {"rope_scaling": [2]}, "rope_scaling is [2]; supported: an object"),
        (LLAMA_FIELDS, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        (LLAMA_FIELDS, {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rs.low_freq_factor is missing"),
        (LLAMA_FIELDS, {"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section is [1]"),
        (LLAMA_FIELDS, {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}"),
        (LLAMA_FIELDS, {"rope_parameters": {"rope_theta": "1e6"}}, 'rope_parameters.rope_theta is "1e6"'),
        (LLAMA_FIELDS | MISTRAL, {"layer_types": ["full_attention"] * 2}, "layer_types is"),
        (LLAMA_FIELDS | MISTRAL, {"sliding_window": -1}, "sliding_window is -1"),
        (LLAMA_FIELDS | QWEN2, {"layer_types": ["sliding_attention"] * 2}, "2 of full_attention"),
        (LLAMA_FIELDS | QWEN3, {"layer_types": ["full_attention"]}, "2 of full_attention"),
        (LLAMA_FIELDS | QWEN3, {"layer_types": ["linear_attention"] * 2}, 'layer_types is ["linear_attention"'),
        (GPT2_FIELDS, {"activation_function": "relu"}, 'activation_function is "relu"'),
        (GPT2_FIELDS, {"n_head": 5}, "n_head is 5; supported: a divisor of n_embd 64"),
        (GPT2_FIELDS, {"add_cross_attention": True}, "add_cross_attention is true"),
        (GPT2_FIELDS, {"n_embd": None}, "n_embd is null"),
        (BLOOM_FIELDS, {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is true"),
        (BLOOM_FIELDS, {"n_head": 7}, "n_head is 7"),
        (NEOX_FIELDS, {"hidden_act": "relu"}, 'hidden_act is "relu"'),
        (NEOX_FIELDS, {"num_attention_heads": 5}, "num_attention_heads is 5"),
        (NEOX_FIELDS, {"rotary_pct": 1.5}, "a share of a head of 16"),
        (NEOX_FIELDS, {"rope_parameters": {"partial_rotary_factor": 0.2}}, "rs.partial_rotary_factor is 0.2"),
        (GPTJ_FIELDS, {"rotary_dim": None}, "rotary_dim is null; supported: an even number up to a head's size 16"),
        (GPTJ_FIELDS, {"rotary_dim": 18}, "rotary_dim is 18"),
        (OPT_FIELDS, {"activation_function": "silu"}, 'activation_function is "silu"'),
        (GEMMA2_FIELDS, {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
        (GEMMA2_FIELDS, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (GEMMA2_FIELDS, {"layer_types": ["full_attention"]}, "3 of full_attention or sliding_attention"),
        (GEMMA2_FIELDS, {"final_logit_softcapping": "30"}, 'final_logit_softcapping is "30"'),
        (GEMMA3_FIELDS, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3_FIELDS, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta is 1000000.0"),
        (GEMMA3_FIELDS, {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, 'rope_scaling.rope_type is "yarn"'),
        (PHI3_FIELDS, {"rope_parameters": {"rope_type": "linear", "factor": 2}}, 'rs.rope_type is "linear"'),
        (PHI3_FIELDS, {"rope_scaling": {"type": "su"}, "rope_parameters": None}, "rope_scaling.long_factor is missing"),
        (PHI3_FIELDS, {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        (FALCON_FIELDS, {"activation": "relu"}, 'activation is "relu"'),
        (FALCON_FIELDS, {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2"),
        (FALCON_FIELDS, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2; supported: 1"),
        (FALCON_FIELDS, {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is false"),
        (FALCON_FIELDS, {"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads is 3"),
    ],
)  # fmt: skip
def test_refusals_name_field_and_value(
    tmp_path: Path, fields: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    read(tmp_path, fields)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read(tmp_path, fields, **change)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_generation_config_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is \"x\""):
        read(tmp_path, LLAMA_FIELDS)


def test_every_architecture_is_read(tmp_path: Path) -> None:
    sizes = LLAMA_FIELDS | GPT2_FIELDS | BLOOM_FIELDS | OPT | GPTJ | FALCON
    for name in ARCHITECTURES:
        config = read(tmp_path, sizes, architectures=[name], num_labels=3, text_config=LLAMA)
        assert config.architecture == name
        assert config.labels == (3 if "Classification" in name else 0)


def test_labels(tmp_path: Path) -> None:
    reward = {"architectures": ["LlamaForSequenceClassification"]}
    assert read(tmp_path, LLAMA_FIELDS, **reward).labels == 2  # as transformers leaves it out
    assert read(tmp_path, LLAMA_FIELDS, **reward, id2label={"0": "score"}).labels == 1


def test_defaults_are_those_of_the_architecture(tmp_path: Path) -> None:
    bare = {name: value for name, value in LLAMA_FIELDS.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    assert read(tmp_path, bare).kv_heads == 4
    assert read(tmp_path, bare).norm_eps == 1e-6
    assert read(tmp_path, bare | MISTRAL | {"num_attention_heads": 16}).kv_heads == 8
    assert read(tmp_path, bare | MISTRAL | {"num_attention_heads": 16}).windows == (4096, 4096)
    assert read(tmp_path, LLAMA_FIELDS | MISTRAL, sliding_window=None).windows == (None, None)
    assert read(tmp_path, bare | QWEN3).head_size == 128
    assert read(tmp_path, bare | QWEN2).qkv_bias
    gpt2 = {name: value for name, value in GPT2_FIELDS.items() if name != "n_positions"}
    assert read(tmp_path, gpt2, max_position_embeddings=99).context == 99
    assert read(tmp_path, GPT2_FIELDS).tied
    assert read(tmp_path, GPT2_FIELDS, scale_attn_weights=False).attention_scales == (1.0, 1.0)


def test_defaults_of_the_later_families(tmp_path: Path) -> None:
    def bare(fields: dict[str, Any], *names: str, **more: Any) -> ModelConfig:
        return read(tmp_path, {name: value for name, value in fields.items() if name not in names}, **more)

    neox = bare(NEOX_FIELDS, "rotary_pct", "max_position_embeddings")
    assert (neox.rope, neox.context, neox.tied, neox.parallel) == (Rope(rotary_size=4), 2048, False, True)
    assert bare(NEOX_FIELDS, rotary_emb_base=7, rotary_pct=0.5).rope == Rope("default", 7.0, 8)
    given = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    assert bare(NEOX_FIELDS, "rotary_pct", rope_parameters=given).rope == Rope("default", 7.0, 8)

    opt = bare(OPT_FIELDS, "max_position_embeddings")
    assert (opt.context, opt.tied, opt.activation, opt.final_norm, opt.output_size) == (2048, True, "relu", True, 64)
    assert not bare(OPT_FIELDS, do_layer_norm_before=False).final_norm

    gemma2 = bare(GEMMA2_FIELDS, "head_dim", "num_key_value_heads", "query_pre_attn_scalar", "sliding_window")
    assert (gemma2.head_size, gemma2.kv_heads, gemma2.attention_scales) == (256, 4, (1 / 16,) * 3)
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.windows) == (50.0, 30.0, (4096, None, 4096))
    assert bare(GEMMA2_FIELDS, "tie_word_embeddings").tied  # transformers leaves out what its base class has
    null = bare(GEMMA2_FIELDS, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (null.attention_softcap, null.logit_softcap) == (None, None)

    falcon = bare(FALCON_FIELDS, "max_position_embeddings", "ffn_hidden_size")
    assert (falcon.kv_heads, falcon.context, falcon.intermediate_size, falcon.tied) == (1, 2048, 256, True)
    assert bare(FALCON_FIELDS, multi_query=False).kv_heads == 4
    new = bare(FALCON_FIELDS, new_decoder_architecture=True, num_kv_heads=2)
    assert (new.kv_heads, new.parallel_norms) == (2, 2)
    assert bare(FALCON_FIELDS, alibi=True).rope is None


def test_rotation_of_gemma3_in_old_and_new_form(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_local_base_freq": 9.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
    }
    for given in (old, {"rope_parameters": kinds}):
        config = read(tmp_path, GEMMA3_FIELDS, **given)
        assert config.rope == Rope("linear", 5e5, 24, 8.0, 512)
        assert config.local_rope == Rope("default", 9.0, 24)
        assert config.context == 512  # is the stretched one
    plain = read(tmp_path, GEMMA3_FIELDS)
    assert (plain.rope, plain.local_rope) == (Rope("default", 1e6, 24), Rope("default", 1e4, 24))
    assert read(tmp_path, GEMMA3_FIELDS, num_hidden_layers=7).windows == (24, 24, 24, 24, 24, None, 24)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_of_phi3(tmp_path: Path, name: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    given = {"rope_parameters": None, "rope_scaling": {"type": name, **factors}}
    config = read(tmp_path, PHI3_FIELDS, **given, original_max_position_embeddings=128)
    assert config.rope is not None and config.context == 512
    assert config.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    assert config.rope.factors == (2.0,) * 8
    assert config.rope.within(129) is config.rope
    assert config.rope.within(128).factors == (1.0,) * 8
    unstretched = read(tmp_path, PHI3_FIELDS, **given, original_max_position_embeddings=512).rope
    assert unstretched is not None and (unstretched.factors, unstretched.attention_factor) == ((1.0,) * 8, 1.0)


def test_old_names_of_bloom(tmp_path: Path) -> None:
    old = {
        "architectures": ["BloomForCausalLM"],
        "vocab_size": 9,
        "n_embed": 64,
        "n_layer": 3,
        "num_attention_heads": 4,
    }
    config = read(tmp_path, old)
    assert (config.hidden_size, config.layers, config.heads, config.context) == (64, 3, 4, 2048)


def test_windows_of_qwen(tmp_path: Path) -> None:
    qwen = LLAMA_FIELDS | QWEN2 | {"num_hidden_layers": 3, "sliding_window": 20}
    assert read(tmp_path, qwen, max_window_layers=1).windows == (None, None, None)
    assert read(tmp_path, qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 20, 20)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert read(tmp_path, qwen, use_sliding_window=True, layer_types=types).windows == (20, None, None)


@pytest.mark.parametrize(
    ("given", "rope", "context"),
    [
        ({}, Rope("default", 10000.0, 16), 512),
        ({"rope_theta": 5e5}, Rope("default", 5e5, 16), 512),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, Rope("default", 1e6, 16), 512),
        ({"rope_scaling": None, "rope_theta": 7.0}, Rope("default", 7.0, 16), 512),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope("linear", 10000.0, 16, 4.0, 512), 2048),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 9.0},
            Rope("dynamic", 9.0, 16, 2.0, 512),
            1024,
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            Rope("yarn", 10000.0, 16, 4.0, 512, attention_factor=0.1 * math.log(4) + 1),
            2048,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0.5, "beta_fast": 9, "truncate": False}},
            Rope("yarn", 10000.0, 16, 4.0, 512, attention_factor=0.5, beta_fast=9.0, truncate=False),
            2048,
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
                "original_max_position_embeddings": 128,
            },
            Rope("yarn", 10000.0, 16, 4.0, 128, attention_factor=(0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
            512,
        ),
    ],
)  # fmt: skip
def test_rope_in_old_and_new_form(tmp_path: Path, given: dict[str, Any], rope: Rope, context: int) -> None:
    config = read(tmp_path, LLAMA_FIELDS, **given)
    assert (config.rope, config.context) == (rope, context)


@pytest.mark.parametrize("fields", [{}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"truncate": False}, {"beta_fast": 8}])
def test_yarn_tables_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    given = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        **fields,
    }
    config = read(tmp_path, LLAMA_FIELDS, rope_parameters=dict(given))
    reference = LlamaRotaryEmbedding(LlamaConfig(**LLAMA | {"rope_parameters": dict(given)}))
    theirs = reference(torch.empty(1), torch.arange(512).unsqueeze(0))
    assert config.rope is not None
    for ours, their in zip(tables(config.rope, 512), theirs, strict=True):
        torch.testing.assert_close(ours, their[0, :, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 14, 16, 112])
def test_alibi_slopes(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    torch.testing.assert_close(alibi_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))
