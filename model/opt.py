"""OPT: learned positions, of which the first two rows are nobody's, and embeddings that may be narrower than the model.

Letters: T tokens of the step, D model size, E embedding size, N heads, H head size, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import Activation, KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import TANH, Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import LayerNorm
from .slots import Place

OFFSET = 2  # position p is row p + 2


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for OPT."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    embedding_size = fields.integer("word_embed_proj_dim", default=hidden_size)
    bias, norm_first = fields.flag("enable_bias", True), fields.flag("do_layer_norm_before", True)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("ffn_dim"),
        context=fields.integer("max_position_embeddings", default=2048),
        norm_eps=1e-5,
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", True),
        activation=fields.choice("activation_function", allowed=("relu", "gelu", *TANH), default="relu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embedding_size=None if embedding_size == hidden_size else embedding_size,
        norm_affine=fields.flag("layer_norm_elementwise_affine", True),
        norm_first=norm_first,
        final_norm=norm_first and not fields.flag("_remove_final_layer_norm", False),
    )


class OPTAttention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.scale = config.heads, config.head_size**-0.5
        self.qkv_proj = Linear(
            ("q_proj", "k_proj", "v_proj"), size, (size, size, size), place, split="column", bias=config.qkv_bias
        )
        self.out_proj = Linear(("out_proj",), size, (size,), place, split="row", bias=config.output_bias)

    def forward(self, x: Tensor, batch: Batch, cache: KVLayer) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [T, N, H] each
        ops.write_kv(k, v, batch.slots, cache)
        return self.out_proj(batch.kept(ops.paged_attention(q, cache, batch.sequences, self.scale)).flatten(1))


class OPTLayer(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.norm_first, self.relu = config.norm_first, config.activation == "relu"
        activation: Activation | None = None if self.relu else "gelu_tanh" if config.activation in TANH else "gelu"
        self.self_attn = OPTAttention(config, place)
        self.self_attn_layer_norm = LayerNorm(outer, config.norm_eps, place, config.norm_affine)
        self.fc1 = Linear(("fc1",), outer, (inner,), place, split="column", bias=config.mlp_bias, activation=activation)
        self.fc2 = Linear(("fc2",), inner, (outer,), place, split="row", bias=config.mlp_bias)
        self.final_layer_norm = LayerNorm(outer, config.norm_eps, place, config.norm_affine)

    def forward(self, x: Tensor, batch: Batch, cache: KVLayer) -> Tensor:
        """x [T, D], which is overwritten -> those of its rows that go on."""
        if self.norm_first:
            attended = self.self_attn(self.self_attn_layer_norm(x), batch, cache)
            x = batch.kept(x).add_(attended)
            return x.add_(self._mlp(self.final_layer_norm(x)))
        attended = self.self_attn(x, batch, cache)
        x = self.self_attn_layer_norm(attended, batch.kept(x))
        return self.final_layer_norm(self._mlp(x), x)

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        return self.fc2(F.relu(inner, inplace=True) if self.relu else inner)


class OPTLayers(nn.Module):
    """What the checkpoint calls `decoder`."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        narrow, wide = config.output_size, config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, narrow, place)
        self.embed_positions = Embedding(config.context + OFFSET, wide, place)
        self.project_in = Linear(("project_in",), narrow, (wide,), place, split="none") if narrow != wide else None
        self.layers = nn.ModuleList(OPTLayer(config, place) for _ in range(config.layers))
        self.final_layer_norm = (
            LayerNorm(wide, config.norm_eps, place, config.norm_affine) if config.final_norm else None
        )
        self.project_out = Linear(("project_out",), wide, (narrow,), place, split="none") if narrow != wide else None

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        x = self.embed_tokens(batch.token_ids)
        x = x if self.project_in is None else self.project_in(x)
        x = x.add_(self.embed_positions(batch.positions + OFFSET))
        for layer, pages, rows in zip(self.layers, cache.layers, batch.of_layers(len(self.layers)), strict=True):
            x = layer(x, rows, pages)
        x = x if self.final_layer_norm is None else self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)


class OPTDecoder(nn.Module):
    PREFIX = "model."
    IGNORED = r"decoder\.version"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.decoder = OPTLayers(config, place)

    @property
    def embedding(self) -> Tensor:
        """[V, E], which a tied head shares."""
        return self.decoder.embed_tokens.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, E] after the last layer. K and V of all rows go into the cache."""
        return self.decoder(batch, cache)
