"""GPT-J: neighbouring elements of a head are rotated as pairs, attention and MLP read the same normalised states.

Letters: T tokens of the step, D model size, N heads, H head size, V vocabulary.
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
from .rotary import Rope, Rotary
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for GPT-J."""
    hidden_size, heads = fields.integer("n_embd", "hidden_size"), fields.integer("n_head", "num_attention_heads")
    if hidden_size % heads:
        raise fields.error("n_head", f"a divisor of n_embd {hidden_size}")
    rotated = fields.integer("rotary_dim", default=64)
    if fields.values.get("rotary_dim", rotated) is None or rotated % 2 or rotated > hidden_size // heads:
        raise fields.error("rotary_dim", f"an even number up to a head's size {hidden_size // heads}")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer("n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_size=hidden_size // heads,
        intermediate_size=fields.integer("n_inner", default=4 * hidden_size),
        context=fields.integer("n_positions", "max_position_embeddings", default=2048),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("activation_function", allowed=("gelu", *TANH), default="gelu_new"),
        rope=Rope(rotary_size=rotated),
        head_bias=True,
        parallel=True,
    )


class GPTJAttention(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        size = config.hidden_size
        self.scale = config.head_size**-0.5
        self.qkv_proj = Linear(("q_proj", "k_proj", "v_proj"), size, (size, size, size), place, split="column")
        self.out_proj = Linear(("out_proj",), size, (size,), place, split="row")

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer) -> Tensor:
        q = ops.qk_norm_rotary_and_write_kv(
            self.qkv_proj(x),  # [T, 3 N H]
            None,
            None,
            0.0,
            batch.positions,
            rotary.cos,
            rotary.sin,
            True,
            batch.slots,
            cache,
        )
        return self.out_proj(batch.kept(ops.paged_attention(q, cache, batch.sequences, self.scale)).flatten(1))


class GPTJMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.fc_in = Linear(
            ("fc_in",),
            outer,
            (inner,),
            place,
            split="column",
            bias=True,
            activation="gelu_tanh" if config.activation in TANH else "gelu",
        )
        self.fc_out = Linear(("fc_out",), inner, (outer,), place, split="row", bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.fc_in(x))


class GPTJLayer(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.attn = GPTJAttention(config, place)
        self.mlp = GPTJMLP(config, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, in place. Gives both for the rows that go on."""
        normed = self.ln_1(x, residual)
        attended = self.attn(normed, batch, rotary, cache)
        return self.mlp(batch.kept(normed)).add_(attended), batch.kept(residual)


class GPTJDecoder(nn.Module):
    PREFIX = "transformer."
    IGNORED = r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)"  # causal masks, angles

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.wte = Embedding(config.vocab_size, config.hidden_size, place)
        self.h = nn.ModuleList(GPTJLayer(config, place) for _ in range(config.layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.rotary = Rotary(config.rope, config.context, place.device)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.wte.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.wte(batch.token_ids)
        residual = x.new_zeros(x.shape)
        for layer, pages, rows in zip(self.h, cache.layers, batch.of_layers(len(self.h)), strict=True):
            x, residual = layer(x, residual, rows, self.rotary, pages)
        return self.ln_f(x, residual)
