"""OLMo 2: norms only behind attention and MLP; q and k are normalised over all their heads together.

Letters: T tokens of the step, D model size, N query heads, K kv heads, H head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .llama import LlamaMLP
from .norms import RMSNorm
from .rotary import Rotary, read_rope
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for OLMo 2."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    fields.only("head_dim", hidden_size // heads)
    fields.choice("hidden_act", allowed=("silu", "swish"), default="silu")
    context = fields.integer("max_position_embeddings", default=2048)
    rope, context = read_rope(fields, hidden_size // heads, context)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("num_hidden_layers"),
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
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def norm_of(size: int, config: ModelConfig, place: Place) -> RMSNorm:
    """Multiplied by its weight before it is rounded."""
    return RMSNorm(size, config.norm_eps, place._replace(dtype=torch.float32))


class Olmo2Attention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.scale = config.head_size**-0.5
        self.qkv_proj = Linear(
            ("q_proj", "k_proj", "v_proj"),
            config.hidden_size,
            (queries, keys, keys),
            place,
            split="column",
            bias=config.qkv_bias,
        )
        self.o_proj = Linear(("o_proj",), queries, (config.hidden_size,), place, split="row", bias=config.output_bias)
        self.q_norm, self.k_norm = norm_of(queries, config, place), norm_of(keys, config, place)

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer) -> Tensor:
        q, k, v = self.qkv_proj(x).split_with_sizes(self.qkv_proj.outs, 1)  # [T, N H], [T, K H] twice
        qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), 1)
        q = ops.qk_norm_rotary_and_write_kv(
            qkv, None, None, 0.0, batch.positions, rotary.cos, rotary.sin, False, batch.slots, cache
        )
        return self.o_proj(batch.kept(ops.paged_attention(q, cache, batch.sequences, self.scale)).flatten(1))


class Olmo2Layer(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, place)
        self.post_attention_layernorm = norm_of(config.hidden_size, config, place)
        self.mlp = LlamaMLP(config, place)
        self.post_feedforward_layernorm = norm_of(config.hidden_size, config, place)

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer) -> Tensor:
        """x [T, D], which is overwritten -> those of its rows that go on."""
        attended = self.post_attention_layernorm(self.self_attn(x, batch, rotary, cache))
        x = batch.kept(x).add_(attended)
        return x.add_(self.post_feedforward_layernorm(self.mlp(x)))


class Olmo2Decoder(nn.Module):
    PREFIX = "model."
    IGNORED = r"rotary_emb\.inv_freq"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(Olmo2Layer(config, place) for _ in range(config.layers))
        self.norm = norm_of(config.hidden_size, config, place)
        self.rotary = Rotary(config.rope, config.context, place.device)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.embed_tokens.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.embed_tokens(batch.token_ids)
        for layer, pages, rows in zip(self.layers, cache.layers, batch.of_layers(len(self.layers)), strict=True):
            x = layer(x, rows, self.rotary, pages)
        return self.norm(x)
