"""Phi-3 and Phi-4-mini: LLaMA's decoder; checkpoints have q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from .config import ModelConfig, read_dtype, read_end_ids
from .fields import Fields
from .rotary import read_rope, rope_type


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for Phi-3. The decoder is `llama.LlamaDecoder`."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    fields.choice("hidden_act", allowed=("silu", "swish"), default="silu")
    given = fields.object("rope_parameters", "rope_scaling")
    if rope_type(given) == "yarn":  # what the first checkpoints call LongRoPE
        given = Fields(given.path, given.values | {"rope_type": "longrope"}, given.inside)
    if rope_type(given) not in ("default", "longrope"):
        raise given.error("rope_type" if "rope_type" in given.values else "type", "'default' or 'longrope'")
    context = fields.integer("max_position_embeddings", default=4096)
    if rope_type(given) == "longrope":
        original = fields.integer("original_max_position_embeddings", default=4096)
        given = Fields(given.path, given.values | {"original_max_position_embeddings": original}, given.inside)
    rope, context = read_rope(
        fields,
        hidden_size // heads,
        context,
        given=given,
        share=fields.number("partial_rotary_factor", 1.0),
    )
    layers, window = fields.integer("num_hidden_layers"), fields.integer("sliding_window", default=0, least=0)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("intermediate_size"),
        context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", False),
        activation="silu",
        gated=True,
        rope=rope,
        windows=(window or None,) * layers,
        fused=True,
    )
