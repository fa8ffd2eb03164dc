"""StarCoder2: LLaMA's attention with biases, between layer norms, and GPT-2's MLP.

Letters: T tokens of the step, D model size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import TANH, Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .llama import LlamaAttention
from .norms import LayerNorm
from .rotary import Rotary, read_rope
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for StarCoder2."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=2)
    if hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    fields.only("head_dim", hidden_size // heads)
    rope, context = read_rope(fields, hidden_size // heads, fields.integer("max_position_embeddings", default=4096))
    layers, window = fields.integer("num_hidden_layers"), fields.integer("sliding_window", default=0, least=0)
    bias = fields.flag("use_bias", True)
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
        norm_eps=fields.number("norm_epsilon", 1e-5),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", True),
        activation=fields.choice("hidden_act", allowed=("gelu", *TANH), default="gelu_pytorch_tanh"),
        rope=rope,
        windows=(window or None,) * layers,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


class Starcoder2MLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.c_fc = Linear(
            ("c_fc",),
            outer,
            (inner,),
            place,
            split="column",
            bias=config.mlp_bias,
            activation="gelu_tanh" if config.activation in TANH else "gelu",
        )
        self.c_proj = Linear(("c_proj",), inner, (outer,), place, split="row", bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class Starcoder2Layer(nn.Module):
    def __init__(self, config: ModelConfig, window: int | None, place: Place) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.self_attn = LlamaAttention(config, window, place)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = Starcoder2MLP(config, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and then by this attention's, in place.
        Gives both for the rows that go on."""
        x = self.self_attn(self.input_layernorm(x, residual), batch, rotary, cache)
        residual = batch.kept(residual)
        return self.mlp(self.post_attention_layernorm(x, residual)), residual


class Starcoder2Decoder(nn.Module):
    PREFIX = "model."
    IGNORED = r"rotary_emb\.inv_freq"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(Starcoder2Layer(config, window, place) for window in config.windows)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, place)
        self.rotary = Rotary(config.rope, config.context, place.device)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.embed_tokens.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.embed_tokens(batch.token_ids)
        residual = x.new_zeros(x.shape)
        for layer, pages, rows in zip(self.layers, cache.layers, batch.of_layers(len(self.layers)), strict=True):
            x, residual = layer(x, residual, rows, self.rotary, pages)
        return self.norm(x, residual)
