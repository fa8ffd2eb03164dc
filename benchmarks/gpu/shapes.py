"""The models of the suite as config.json says them, and what a step of one must read and compute.

Letters: B sequences, T tokens, D model size, N query heads, K kv heads, H head size, V vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...model.config import ModelConfig, read_config
from ...model.kv_cache import KVCache

Shape = Mapping[str, Any]

LLAMA_7B: Shape = MappingProxyType(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float16",
        "eos_token_id": 2,
    }
)
LLAMA_3_8B: Shape = MappingProxyType(
    {
        **LLAMA_7B,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "dtype": "bfloat16",
        "eos_token_id": 128001,
    }
)
QWEN2_05B: Shape = MappingProxyType(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_id": 151643,
    }
)
BLOOM_7B1: Shape = MappingProxyType(
    {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "seq_length": 2048,
        "dtype": "float16",
        "eos_token_id": 2,
    }
)
GPT2_124M: Shape = MappingProxyType(
    {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "dtype": "float16",
        "eos_token_id": 50256,
    }
)

_SMALL_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
TINY: Mapping[str, Shape] = MappingProxyType(
    {
        "llama": MappingProxyType({**LLAMA_7B, **_SMALL_LLAMA, "num_key_value_heads": 4}),
        "llama GQA": MappingProxyType({**LLAMA_3_8B, **_SMALL_LLAMA}),
        "qwen2": MappingProxyType({**QWEN2_05B, **_SMALL_LLAMA}),
        "bloom": MappingProxyType(
            {**BLOOM_7B1, "vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 512}
        ),
        "gpt2": MappingProxyType(
            {**GPT2_124M, "vocab_size": 512, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
            | {"eos_token_id": 2}
        ),
    }
)
REAL: Mapping[str, Shape] = MappingProxyType(
    {"llama": LLAMA_7B, "llama GQA": LLAMA_3_8B, "qwen2": QWEN2_05B, "bloom": BLOOM_7B1, "gpt2": GPT2_124M}
)
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "LLaMA-7B",
        "llama GQA": "Llama-3-8B",
        "qwen2": "Qwen2-0.5B",
        "bloom": "BLOOM-7B1",
        "gpt2": "GPT-2 124M",
    }
)


def rewarding(shape: Shape) -> Shape:
    """The same decoder with a reward head of one output."""
    name = shape["architectures"][0].replace("ForCausalLM", "").replace("LMHeadModel", "")
    return MappingProxyType({**shape, "architectures": [f"{name}ForSequenceClassification"], "num_labels": 1})


def config_of(shape: Shape) -> ModelConfig:
    """What the server reads from this config.json."""
    with tempfile.TemporaryDirectory() as directory:
        write_config(shape, Path(directory))
        return read_config(directory)


def write_config(shape: Shape, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(dict(shape)))


def matrix_elements(config: ModelConfig) -> int:
    """Elements of the matrices that every token is multiplied with, the head's not counted."""
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    attention = config.hidden_size * (2 * queries + 2 * keys)
    matrices = 3 if config.gated else 2  # gated or not
    return config.layers * (attention + matrices * config.hidden_size * config.intermediate_size)


def step_bytes(config: ModelConfig, weight_bytes: float, kv_dtype: torch.dtype, context: float, rows: int) -> float:
    """Bytes that a decode step must read: every matrix and the head once, and all K and V.

    `weight_bytes` is what an element of a matrix takes. Vectors, activations and the written K and V are under 1 %.
    """
    weights = matrix_elements(config) + config.vocab_size * config.hidden_size
    return weights * weight_bytes + rows * context * kv_bytes(config, kv_dtype)


def kv_bytes(config: ModelConfig, dtype: torch.dtype) -> float:
    """Bytes of one token's K and V in all layers."""
    return KVCache.bytes_per_page(config, 64, dtype) / 64


def prefill_flops(config: ModelConfig, lengths: list[int], cached: int = 0, head_rows: int = 0) -> float:
    """Operations to compute prompts of these lengths, whose first `cached` tokens need not be computed again."""
    tokens = sum(length - cached for length in lengths)
    seen = sum((length * (length + 1) - cached * (cached + 1)) / 2 for length in lengths)
    attention = 4 * config.layers * config.heads * config.head_size * seen
    return 2 * matrix_elements(config) * tokens + attention + 2 * head_rows * config.vocab_size * config.hidden_size
