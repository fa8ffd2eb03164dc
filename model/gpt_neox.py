"""GPT-NeoX and Pythia: a partly rotated head, attention and MLP beside each other.

Letters: T tokens of the step, D model size, N heads, H head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import TANH, Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import LayerNorm
from .rotary import Rotary, read_rope
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for GPT-NeoX."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    rope, context = read_rope(
        fields,
        hidden_size // heads,
        fields.integer("max_position_embeddings", default=2048),
        theta=fields.number("rotary_emb_base", 10000.0),
        share=fields.number("rotary_pct", 0.25),
    )
    bias = fields.flag("attention_bias", True)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("intermediate_size"),
        context=context,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("hidden_act", allowed=("gelu", *TANH), default="gelu"),
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
        parallel=fields.flag("use_parallel_residual", True),
    )


def by_kind(groups: int, queries: int, size: int) -> Tensor:
    """The rows of all q, of all k, of all v, where they lie as (`queries` q heads, k, v) group by group."""
    heads = torch.arange(groups * (queries + 2) * size).view(groups, queries + 2, size)
    return torch.cat((heads[:, :queries].flatten(), heads[:, queries].flatten(), heads[:, queries + 1].flatten()))


class GPTNeoXAttention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        size = config.hidden_size
        self.scale = config.head_size**-0.5
        self.query_key_value = Linear(
            ("query_key_value",),
            size,
            (3 * size,),
            place,
            split="column",
            bias=config.qkv_bias,
            order=by_kind(config.heads, 1, config.head_size),
        )
        self.dense = Linear(("dense",), size, (size,), place, split="row", bias=config.output_bias)

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer) -> Tensor:
        q = ops.qk_norm_rotary_and_write_kv(
            self.query_key_value(x),  # [T, 3 N H]
            None,
            None,
            0.0,
            batch.positions,
            rotary.cos,
            rotary.sin,
            False,
            batch.slots,
            cache,
        )
        return self.dense(batch.kept(ops.paged_attention(q, cache, batch.sequences, self.scale)).flatten(1))


class GPTNeoXMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.dense_h_to_4h = Linear(
            ("dense_h_to_4h",),
            outer,
            (inner,),
            place,
            split="column",
            bias=True,
            activation="gelu_tanh" if config.activation in TANH else "gelu",
        )
        self.dense_4h_to_h = Linear(("dense_4h_to_h",), inner, (outer,), place, split="row", bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x))


class GPTNeoXLayer(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.attention = GPTNeoXAttention(config, place)
        self.mlp = GPTNeoXMLP(config, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and, if not parallel, by this attention's.
        Gives both for the rows that go on."""
        attended = self.attention(self.input_layernorm(x, residual), batch, rotary, cache)
        residual = batch.kept(residual)
        if self.parallel:
            return self.mlp(self.post_attention_layernorm(residual)).add_(attended), residual
        return self.mlp(self.post_attention_layernorm(attended, residual)), residual


class GPTNeoXDecoder(nn.Module):
    PREFIX = "gpt_neox."
    IGNORED = r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"  # causal masks, angles

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.embed_in = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(GPTNeoXLayer(config, place) for _ in range(config.layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.rotary = Rotary(config.rope, config.context, place.device)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.embed_in.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.embed_in(batch.token_ids)
        residual = x.new_zeros(x.shape)
        for layer, pages, rows in zip(self.layers, cache.layers, batch.of_layers(len(self.layers)), strict=True):
            x, residual = layer(x, residual, rows, self.rotary, pages)
        return self.final_layer_norm(x, residual)
