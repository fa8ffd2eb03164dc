"""BLOOM: ALiBi instead of positions, a norm behind the embedding.

Letters: T tokens of the step, D model size, N heads, H head size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import LayerNorm
from .slots import Place

CONTEXT = 2048  # what BLOOM was trained on; ALiBi itself has no bound


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for BLOOM."""
    hidden_size = fields.integer("hidden_size", "n_embed")
    heads = fields.integer("n_head", "num_attention_heads")
    if hidden_size % heads:
        raise fields.error("n_head", f"a divisor of hidden_size {hidden_size}")
    if fields.integer("pretraining_tp", default=1) > 1:
        fields.only("slow_but_exact", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=hidden_size // heads,
        intermediate_size=4 * hidden_size,
        context=fields.integer("seq_length", default=CONTEXT),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", True),
        activation="gelu_tanh",
        residual_after_norm=fields.flag("apply_residual_connection_post_layernorm", False),
    )


def alibi_slopes(heads: int) -> Tensor:
    """[N] float32: r, r², … with r = 2 ^ (-8 / n) for n = the largest power of two up to N, and for what is left of N
    the odd powers of the r that belongs to 2 n."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * index / whole) for index in range(1, whole + 1)]
    slopes += [2 ** (-4 * index / whole) for index in range(1, 2 * (heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class BloomAttention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.scale = config.heads, config.head_size**-0.5
        self.query_key_value = Linear(("query_key_value",), size, (3 * size,), place, split="column", bias=True)
        self.dense = Linear(("dense",), size, (size,), place, split="row", bias=True)

    def forward(self, x: Tensor, batch: Batch, alibi: Tensor, cache: KVLayer) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).unbind(2)  # [T, N, H] each
        ops.write_kv(k, v, batch.slots, cache)
        out = ops.paged_attention(q, cache, batch.sequences, self.scale, alibi=alibi)
        return self.dense(batch.kept(out).flatten(1))


class BloomMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.dense_h_to_4h = Linear(
            ("dense_h_to_4h",), outer, (inner,), place, split="column", bias=True, activation="gelu_tanh"
        )
        self.dense_4h_to_h = Linear(("dense_4h_to_h",), inner, (outer,), place, split="row", bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x))


class BloomLayer(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.residual_after_norm = config.residual_after_norm
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.self_attention = BloomAttention(config, place)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = BloomMLP(config, place)

    def forward(self, x: Tensor, batch: Batch, alibi: Tensor, cache: KVLayer) -> Tensor:
        """x [T, D] -> those of its rows that go on."""
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, batch, alibi, cache)
        x = attended.add_(batch.kept(normed if self.residual_after_norm else x))
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed).add_(normed if self.residual_after_norm else x)


class BloomDecoder(nn.Module):
    PREFIX = "transformer."
    IGNORED = r"h\.\d+\.self_attention\.(bias|masked_bias)"  # causal masks

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, place)
        self.word_embeddings_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.h = nn.ModuleList(BloomLayer(config, place) for _ in range(config.layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.alibi = nn.Buffer(alibi_slopes(config.heads).to(place.device))

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.word_embeddings.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.word_embeddings_layernorm(self.word_embeddings(batch.token_ids))
        for layer, pages, rows in zip(self.h, cache.layers, batch.of_layers(len(self.h)), strict=True):
            x = layer(x, rows, self.alibi, pages)
        return self.ln_f(x)
