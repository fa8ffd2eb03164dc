"""The LLaMA family: LLaMA, Mistral, Qwen2 and Qwen3, which differ in their configs only, and Phi-3's decoder.

Letters: T tokens of the step, D model size, N query heads, K kv heads, H head size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .norms import RMSNorm
from .rotary import Rotary, read_rope
from .slots import Place


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for the architecture."""
    qwen2, qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
    mistral = architecture.startswith("Mistral")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=8 if mistral else heads)
    head_size = fields.integer("head_dim", default=128 if qwen3 else max(1, hidden_size // heads))
    if fields.get("head_dim") is None and not qwen3 and hidden_size % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if head_size % 2:
        raise fields.error("head_dim", "an even number, for rotary pairs")
    fields.choice("hidden_act", allowed=("silu", "swish"), default="silu")
    layers = fields.integer("num_hidden_layers")
    rope, context = read_rope(fields, head_size, fields.integer("max_position_embeddings"))
    attention_bias = not qwen2 and not mistral and fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=fields.integer("intermediate_size"),
        context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=read_end_ids(fields),
        tied=fields.flag("tie_word_embeddings", False),
        activation="silu",
        gated=True,
        rope=rope,
        windows=_windows(fields, layers, mistral, qwen2 or qwen3),
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias,
        mlp_bias=architecture.startswith("Llama") and fields.flag("mlp_bias", False),
        qk_norm=qwen3,
    )


def _windows(fields: Fields, layers: int, mistral: bool, qwen: bool) -> tuple[int | None, ...]:
    """The sliding window of each layer. Mistral has one for all, Qwen from `max_window_layers` on or by name."""
    if mistral:
        fields.only("layer_types", ["sliding_attention"] * layers)
        null = "sliding_window" in fields.values and fields.values["sliding_window"] is None
        return (None if null else fields.integer("sliding_window", default=4096),) * layers
    if not qwen:
        fields.only("layer_types", ["full_attention"] * layers)
        return (None,) * layers
    window = fields.integer("sliding_window", default=4096) if fields.flag("use_sliding_window", False) else None
    full = layers if window is None else fields.integer("max_window_layers", default=28, least=0)
    types = fields.strings("layer_types")
    if types is None:
        types = ["full_attention" if index < full else "sliding_attention" for index in range(layers)]
    allowed = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    if len(types) != layers or not set(types) <= allowed:
        raise fields.error("layer_types", f"{layers} of {' or '.join(sorted(allowed))}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, window: int | None, place: Place) -> None:
        super().__init__()
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.window, self.scale, self.eps = window, config.head_size**-0.5, config.norm_eps
        self.qkv_proj = Linear(
            ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj"),
            config.hidden_size,
            (queries + 2 * keys,) if config.fused else (queries, keys, keys),
            place,
            split="column",
            bias=config.qkv_bias,
        )
        self.o_proj = Linear(("o_proj",), queries, (config.hidden_size,), place, split="row", bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps, place) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps, place) if config.qk_norm else None

    def forward(self, x: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer) -> Tensor:
        q = ops.qk_norm_rotary_and_write_kv(
            self.qkv_proj(x),  # [T, (N + 2 K) H]
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
            batch.positions,
            rotary.cos,
            rotary.sin,
            False,
            batch.slots,
            cache,
        )
        out = ops.paged_attention(q, cache, batch.sequences, self.scale, window=self.window)  # [T, N, H]
        return self.o_proj(batch.kept(out).flatten(1))


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.gate_up_proj = Linear(
            ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj"),
            outer,
            (2 * inner,) if config.fused else (inner, inner),
            place,
            split="column",
            bias=config.mlp_bias,
            activation="silu_and_mul",
        )
        self.down_proj = Linear(("down_proj",), inner, (outer,), place, split="row", bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, config: ModelConfig, window: int | None, place: Place) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.self_attn = LlamaAttention(config, window, place)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = LlamaMLP(config, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and then by this attention's, in place.
        Gives both for the rows that go on."""
        x = self.self_attn(self.input_layernorm(x, residual), batch, rotary, cache)
        residual = batch.kept(residual)
        return self.mlp(self.post_attention_layernorm(x, residual)), residual


class LlamaDecoder(nn.Module):
    PREFIX = "model."
    IGNORED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rotary_emb\.inv_freq"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(LlamaLayer(config, window, place) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, place)
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
