"""GPT-2.

Letters: T tokens of the step, D model size, N heads, H head size, I inner size of the MLP, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import TANH, Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import LayerNorm
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for GPT-2."""
    hidden_size, heads = fields.integer("n_embd", "hidden_size"), fields.integer("n_head", "num_attention_heads")
    layers = fields.integer("n_layer", "num_hidden_layers")
    if hidden_size % heads:
        raise fields.error("n_head", f"a divisor of n_embd {hidden_size}")
    scale = (hidden_size // heads) ** -0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("n_inner", default=4 * hidden_size),
        context=fields.integer("n_positions", "max_position_embeddings"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", True),
        activation=fields.choice("activation_function", allowed=("gelu", *TANH), default="gelu_new"),
        attention_scales=tuple(scale / (index + 1) if by_layer else scale for index in range(layers)),
    )


class GPT2Attention(nn.Module):
    def __init__(self, config: ModelConfig, scale: float, place: Place) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.scale = config.heads, scale
        self.c_attn = Linear(("c_attn",), size, (3 * size,), place, split="column", bias=True, stored_transposed=True)
        self.c_proj = Linear(("c_proj",), size, (size,), place, split="row", bias=True, stored_transposed=True)

    def forward(self, x: Tensor, batch: Batch, cache: KVLayer) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [T, N, H] each
        ops.write_kv(k, v, batch.slots, cache)
        return self.c_proj(batch.kept(ops.paged_attention(q, cache, batch.sequences, self.scale)).flatten(1))


class GPT2MLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.c_fc = Linear(
            ("c_fc",),
            outer,
            (inner,),
            place,
            split="column",
            bias=True,
            stored_transposed=True,
            activation="gelu_tanh" if config.activation in TANH else "gelu",
        )
        self.c_proj = Linear(("c_proj",), inner, (outer,), place, split="row", bias=True, stored_transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class GPT2Layer(nn.Module):
    def __init__(self, config: ModelConfig, scale: float, place: Place) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.attn = GPT2Attention(config, scale, place)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = GPT2MLP(config, place)

    def forward(self, x: Tensor, residual: Tensor, batch: Batch, cache: KVLayer) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and then by this attention's, in place.
        Gives both for the rows that go on."""
        x = self.attn(self.ln_1(x, residual), batch, cache)
        residual = batch.kept(residual)
        return self.mlp(self.ln_2(x, residual)), residual


class GPT2Decoder(nn.Module):
    PREFIX = "transformer."
    IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)"  # causal masks

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size, place)
        self.wpe = Embedding(config.context, config.hidden_size, place)
        self.h = nn.ModuleList(GPT2Layer(config, scale, place) for scale in config.attention_scales)
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, place)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.wte.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.wte(batch.token_ids)
        residual = self.wpe(batch.positions)
        for layer, pages, rows in zip(self.h, cache.layers, batch.of_layers(len(self.h)), strict=True):
            x, residual = layer(x, residual, rows, pages)
        return self.ln_f(x, residual)
