"""Gemma 2 and 3, text: norms before and behind attention and MLP, windows in most layers.

Gemma 3 normalises q and k, and its layers with a window rotate with frequencies of their own; Gemma 2 caps scores.
A checkpoint that reads images, too, is served without the parts that do.

Letters: T tokens of the step, D model size, N query heads, K kv heads, H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import KVLayer
from .batch import Batch
from .config import ModelConfig, read_dtype, read_end_ids
from .fields import Fields
from .kv_cache import KVCache
from .linear import Embedding, Linear
from .rotary import Rope, Rotary, read_rope, rope_type
from .slots import Place, Slot

WITH_IMAGES = "Gemma3ForConditionalGeneration"


def configure(fields: Fields, architecture: str, labels: int) -> ModelConfig:
    """What the config says, with the defaults that transformers has for Gemma 2 and 3."""
    gemma3, end_ids, tied = architecture.startswith("Gemma3"), read_end_ids(fields), "tie_word_embeddings"
    if architecture == WITH_IMAGES:  # what it says of the whole counts before what it says of the text's part
        whole = {name: fields.values[name] for name in ("dtype", "torch_dtype", tied) if name in fields.values}
        fields = fields.object("text_config")
        fields = Fields(fields.path, fields.values | whole, fields.inside)
        end_ids = tuple(sorted({*end_ids, *read_end_ids(fields)}))
    heads, kv_heads = fields.integer("num_attention_heads", default=8), fields.integer("num_key_value_heads", default=4)
    head_size, layers = fields.integer("head_dim", default=256), fields.integer("num_hidden_layers")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if head_size % 2:
        raise fields.error("head_dim", "an even number, for rotary pairs")
    # Published configs also have hidden_act, which transformers does not read.
    fields.choice("hidden_activation", allowed=("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    fields.only("use_bidirectional_attention", False)
    if gemma3:
        fields.only("attn_logit_softcapping")
    context = fields.integer("max_position_embeddings", default=131072 if gemma3 else 8192)
    rope, local_rope = _ropes(fields, head_size, context) if gemma3 else (None, None)
    if rope is None:
        rope, context = read_rope(fields, head_size, context)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", default=262208 if gemma3 else 256000),
        hidden_size=fields.integer("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=fields.integer("intermediate_size"),
        context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        dtype=read_dtype(fields),
        labels=labels,
        end_ids=end_ids,
        tied=fields.flag(tied, True),
        activation="gelu_tanh",
        gated=True,
        rope=rope,
        local_rope=local_rope,
        windows=_windows(fields, layers, 6 if gemma3 else 2),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=gemma3,
        attention_scales=(fields.number("query_pre_attn_scalar", 256.0) ** -0.5,) * layers,
        attention_softcap=None if gemma3 else fields.number_or_none("attn_logit_softcapping", 50.0),
        logit_softcap=fields.number_or_none("final_logit_softcapping", None if gemma3 else 30.0),
    )


def _windows(fields: Fields, layers: int, pattern: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: named by `layer_types`, else of all but every `pattern`-th layer."""
    types = fields.strings("layer_types")
    if types is None:
        every = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=pattern)
        types = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", f"{layers} of full_attention or sliding_attention")
    window = fields.integer("sliding_window", default=4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _ropes(fields: Fields, head_size: int, context: int) -> tuple[Rope, Rope]:
    """Gemma 3's rotary embeddings of the layers without and with a window, in `rope_parameters` by kind of layer, or in
    the older form: `rope_scaling` and `rope_theta` of the former, `rope_local_base_freq` of the latter."""
    both = fields.object("rope_parameters")
    for name in both.values:
        if name not in ("full_attention", "sliding_attention"):
            raise both.error(name, "full_attention and sliding_attention")
    full = both.object("full_attention") if fields.get("rope_scaling") is None else fields.object("rope_scaling")
    ropes = [
        (full, fields.number("rope_theta", 1e6)),
        (both.object("sliding_attention"), fields.number("rope_local_base_freq", 10000.0)),
    ]
    for given, _ in ropes:
        if rope_type(given) not in ("default", "linear"):
            raise given.error("rope_type" if "rope_type" in given.values else "type", "'default' or 'linear'")
    # max_position_embeddings is the stretched context already.
    found = [read_rope(fields, head_size, context, given=given, theta=theta)[0] for given, theta in ropes]
    return found[0], found[1]


class GemmaRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (1 + w), rounded once. The checkpoint has w, `weight` is 1 + w in float32."""

    def __init__(self, size: int, eps: float, place: Place) -> None:
        super().__init__()
        self.weight, self.eps = nn.Buffer(place._replace(dtype=torch.float32).empty(size)), eps

    def slots(self, path: str) -> Iterator[Slot]:
        yield Slot(f"{path}.weight", self.weight, change=_plus_one)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, residual)


def _plus_one(stored: Tensor) -> Tensor:
    return stored.float() + 1


class GemmaAttention(nn.Module):
    def __init__(self, config: ModelConfig, index: int, place: Place) -> None:
        super().__init__()
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.window, self.scale = config.windows[index], config.attention_scales[index]
        self.softcap, self.eps = config.attention_softcap, config.norm_eps
        self.qkv_proj = Linear(
            ("q_proj", "k_proj", "v_proj"),
            config.hidden_size,
            (queries, keys, keys),
            place,
            split="column",
            bias=config.qkv_bias,
        )
        self.o_proj = Linear(("o_proj",), queries, (config.hidden_size,), place, split="row", bias=config.output_bias)
        self.q_norm = GemmaRMSNorm(config.head_size, config.norm_eps, place) if config.qk_norm else None
        self.k_norm = GemmaRMSNorm(config.head_size, config.norm_eps, place) if config.qk_norm else None

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
        out = ops.paged_attention(  # [T, N, H]
            q, cache, batch.sequences, self.scale, window=self.window, softcap=self.softcap
        )
        return self.o_proj(batch.kept(out).flatten(1))


class GemmaMLP(nn.Module):
    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.gate_proj = Linear(("gate_proj",), outer, (inner,), place, split="column", activation="gelu_tanh")
        self.up_proj = Linear(("up_proj",), outer, (inner,), place, split="column")
        self.down_proj = Linear(("down_proj",), inner, (outer,), place, split="row")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).mul_(self.up_proj(x)))


class GemmaLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int, place: Place) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.local = config.local_rope is not None and config.windows[index] is not None
        self.input_layernorm = GemmaRMSNorm(size, eps, place)
        self.self_attn = GemmaAttention(config, index, place)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, place)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, place)
        self.mlp = GemmaMLP(config, place)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, place)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, rotary: Rotary, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, D] grows by `x`, the last layer's output, and then by this attention's, in place.
        Gives both for the rows that go on."""
        x = self.self_attn(self.input_layernorm(x, residual), batch, rotary, cache)
        residual = batch.kept(residual)
        x = self.mlp(self.pre_feedforward_layernorm(self.post_attention_layernorm(x), residual))
        return self.post_feedforward_layernorm(x), residual


class GemmaDecoder(nn.Module):
    PREFIX = ("model.language_model.", "language_model.model.", "model.")  # the first two beside parts for images
    IGNORED = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        assert config.rope is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.scale = float(torch.tensor(config.hidden_size**0.5).to(place.dtype))  # rounded, as the model was trained
        self.layers = nn.ModuleList(GemmaLayer(config, index, place) for index in range(config.layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.norm_eps, place)
        self.rotary = Rotary(config.rope, config.context, place.device)
        self.local_rotary = self.rotary
        if config.local_rope is not None:
            self.local_rotary = Rotary(config.local_rope, config.context, place.device)

    @property
    def embedding(self) -> Tensor:
        """[V, D], which a tied head shares."""
        return self.embed_tokens.weight

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [R, D] after the last norm. K and V of all rows go into the cache."""
        x = self.embed_tokens(batch.token_ids).mul_(self.scale)
        residual = x.new_zeros(x.shape)
        for layer, pages, rows in zip(self.layers, cache.layers, batch.of_layers(len(self.layers)), strict=True):
            x, residual = layer(x, residual, rows, self.local_rotary if layer.local else self.rotary, pages)
        return self.norm(x, residual)
