"""Falcon: attention and MLP beside each other in most models, rotation or ALiBi, one kv head, groups of them or many.

Letters: T tokens of the step, D model size, N query heads, K kv heads, H head size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .bloom import alibi_slopes
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import TANH, Fields
from .gpt_neox import by_kind
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import LayerNorm
from .rotary import Rotary, read_rope
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for Falcon."""
    hidden_size, heads = fields.integer("n_embed", "hidden_size"), fields.integer("num_attention_heads")
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    new, parallel = fields.flag("new_decoder_architecture", False), fields.flag("parallel_attn", True)
    if new and not parallel:
        raise fields.error("parallel_attn", "true (new_decoder_architecture is true)")
    kv_heads = fields.integer("num_kv_heads", default=heads)
    if not new:
        many = not fields.flag("multi_query", True)
        if many and kv_heads != heads:
            raise fields.error("num_kv_heads", f"num_attention_heads {heads} (multi_query is false)")
        kv_heads = heads if many else 1
    elif heads % kv_heads:
        raise fields.error("num_kv_heads", f"a divisor of num_attention_heads {heads}")
    norms = fields.integer("num_ln_in_parallel_attn", default=2 if new else 1)
    if norms > (2 if new else 1):
        raise fields.error("num_ln_in_parallel_attn", "1 or 2" if new else "1 (new_decoder_architecture is false)")
    context, alibi, rope = fields.integer("max_position_embeddings", default=2048), fields.flag("alibi", False), None
    if not alibi:
        rope, context = read_rope(fields, hidden_size // heads, context)
    bias = fields.flag("bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("ffn_hidden_size", default=4 * hidden_size),
        context=context,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", True),
        activation=fields.choice("activation", allowed=("gelu", *TANH), default="gelu"),
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        parallel=parallel,
        parallel_norms=norms,
        alibi=alibi,
    )


def falcon_slopes(config: ModelConfig) -> Tensor:
    """[N] float32: BLOOM's slopes, rounded to bfloat16 as in training, and scaled with the scores they are added to."""
    return alibi_slopes(config.heads).bfloat16().float() * config.head_size**-0.5


class FalconAttention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        size, groups = config.hidden_size, config.kv_heads
        self.heads, self.kv_heads, self.scale = config.heads, config.kv_heads, config.head_size**-0.5
        self.query_key_value = Linear(
            ("query_key_value",),
            size,
            ((config.heads + 2 * groups) * config.head_size,),
            place,
            split="column",
            bias=config.qkv_bias,
            order=by_kind(groups, config.heads // groups, config.head_size),
        )
        self.dense = Linear(("dense",), size, (size,), place, split="row", bias=config.output_bias)

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary | None, alibi: Tensor | None, cache: KVLayer) -> Tensor:
        qkv = self.query_key_value(x)  # [T, (N + 2 K) H]
        if rotary is None:
            parts = (self.heads, self.kv_heads, self.kv_heads)
            q, k, v = qkv.unflatten(-1, (sum(parts), -1)).split_with_sizes(parts, 1)
            ops.write_kv(k, v, batch.slots, cache)
        else:
            q = ops.qk_norm_rotary_and_write_kv(
                qkv, None, None, 0.0, batch.positions, rotary.cos, rotary.sin, False, batch.slots, cache
            )
        out = ops.paged_attention(q, cache, batch.sequences, self.scale, alibi=alibi)
        return self.dense(batch.kept(out).flatten(1))


class FalconMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.dense_h_to_4h = Linear(
            ("dense_h_to_4h",),
            outer,
            (inner,),
            place,
            split="column",
            bias=config.mlp_bias,
            activation="gelu_tanh" if config.activation in TANH else "gelu",
        )
        self.dense_4h_to_h = Linear(("dense_4h_to_h",), inner, (outer,), place, split="row", bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.dense_h_to_4h(x))


class FalconLayer(nn.Module):
    """Norms: `input_layernorm` before both parts, or `ln_attn` and `ln_mlp`, one each; behind one another, also
    `post_attention_layernorm`."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()

        def norm(present: bool) -> LayerNorm | None:
            return LayerNorm(config.hidden_size, config.norm_eps, place) if present else None

        own = config.parallel and config.parallel_norms == 2
        self.input_layernorm = norm(not own)
        self.ln_attn, self.ln_mlp = norm(own), norm(own)
        self.post_attention_layernorm = norm(not config.parallel)
        self.self_attention = FalconAttention(config, place)
        self.mlp = FalconMLP(config, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary | None, alibi: Tensor | None, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and, if not parallel, by this attention's.
        Gives both for the rows that go on."""
        first = self.input_layernorm or self.ln_attn
        assert first is not None
        normed = first(x, residual)
        attended = self.self_attention(normed, batch, rotary, alibi, cache)
        residual = batch.kept(residual)
        if self.post_attention_layernorm is not None:
            return self.mlp(self.post_attention_layernorm(attended, residual)), residual
        normed = batch.kept(normed) if self.ln_mlp is None else self.ln_mlp(residual)
        return self.mlp(normed).add_(attended), residual


class FalconDecoder(nn.Module):
    PREFIX = "transformer."
    IGNORED = r"h\.\d+\.self_attention\.(maybe_)?rotary(_emb)?\.inv_freq"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, place)
        self.h = nn.ModuleList(FalconLayer(config, place) for _ in range(config.layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.rotary = None if config.rope is None else Rotary(config.rope, config.context, place.device)
        self.alibi = nn.Buffer(falcon_slopes(config).to(place.device)) if config.alibi else None

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.word_embeddings.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.word_embeddings(batch.token_ids)
        residual = x.new_zeros(x.shape)
        for layer, pages, rows in zip(self.h, cache.layers, batch.of_layers(len(self.h)), strict=True):
            x, residual = layer(x, residual, rows, self.rotary, self.alibi, pages)
        return self.ln_f(x, residual)
