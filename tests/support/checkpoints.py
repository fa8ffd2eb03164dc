"""Tiny random checkpoints of every variant that Tandem serves, written by transformers.

`write_checkpoint(path, "llama")` makes an ordinary Hugging Face directory: config, safetensors and, if asked for, a
byte-level BPE tokenizer with special tokens and a chat template. Weights are scaled so that greedy text varies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 320  # 256 bytes, the special tokens, merges
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = [
    "The cat sat on the mat and the dog ran after the ball.",
    "What is the answer to this question? The answer is the one that is true.",
    "One, two, three, four, five; then there were ten of them in the other room.",
    "猫坐在垫子上，狗在追球。这个问题的答案是什么？",
]

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
QWEN3 = LLAMA | {"head_dim": 24}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 512,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "seq_length": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rotary_pct": 0.25,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
OPT_POST = {"do_layer_norm_before": False, "num_hidden_layers": 1}  # with more layers greedy text repeats itself
GPTJ = GPT2 | {"rotary_dim": 8}
GEMMA = QWEN3 | {
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 20,
    "sliding_window": 24,
    "tie_word_embeddings": True,
}
GEMMA2 = GEMMA | {"num_hidden_layers": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA3_IMAGES = {
    "text_config": GEMMA,
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"image_size": 16, "patch_size": 8},
    "mm_tokens_per_image": 4,
    "eos_token_id": [EOS_ID, 5],
}
# Heads of 16, rotated in part; a model that is longer than one token is always beyond the original context.
PHI3 = LLAMA | {
    "rope_parameters": {
        "rope_type": "longrope",
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
        "attention_factor": 1.2,
    },
    "original_max_position_embeddings": 1,
}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
FALCON_NEW = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = FALCON | {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False}


def _rope(**parameters: Any) -> dict[str, Any]:
    return LLAMA | {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


# Variant -> architecture, fields of its config.
LANGUAGE_MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-scaled": (
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu", "n_inner": 80},
    ),
    "llama": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 4}),
    "llama-gqa": ("LlamaForCausalLM", LLAMA),
    "llama-bias": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama-linear": ("LlamaForCausalLM", _rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": ("LlamaForCausalLM", _rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 96}),
    "llama-llama3": (
        "LlamaForCausalLM",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": ("LlamaForCausalLM", _rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        LLAMA | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", QWEN3),
    "bloom": ("BloomForCausalLM", BLOOM),
    "bloom-6": ("BloomForCausalLM", BLOOM | {"n_head": 6, "hidden_size": 72}),
    "bloom-post": ("BloomForCausalLM", BLOOM | {"apply_residual_connection_post_layernorm": True}),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox-serial": (
        "GPTNeoXForCausalLM",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt-post": (
        "OPTForCausalLM",
        OPT | OPT_POST | {"word_embed_proj_dim": 24, "tie_word_embeddings": False, "num_attention_heads": 2},
    ),
    "opt-plain": (
        "OPTForCausalLM",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "gptj": ("GPTJForCausalLM", GPTJ),
    "gptj-tied": ("GPTJForCausalLM", GPTJ | {"tie_word_embeddings": True, "n_inner": 80}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | {"sliding_window_pattern": 3}),
    "gemma3-linear": (
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}},
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
        },
    ),
    "gemma3-images": ("Gemma3ForConditionalGeneration", GEMMA3_IMAGES),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"sliding_window": 24}),
    "phi3-long": ("Phi3ForCausalLM", PHI3),
    "phi3-short": ("Phi3ForCausalLM", PHI3 | {"original_max_position_embeddings": 512, "tie_word_embeddings": True}),
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon-new": ("FalconForCausalLM", FALCON_NEW),
    "falcon-11": (
        "FalconForCausalLM",
        FALCON_NEW | {"num_ln_in_parallel_attn": 1, "bias": True, "tie_word_embeddings": False},
    ),
    "falcon-rw": ("FalconForCausalLM", FALCON_RW | {"num_attention_heads": 8}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA | {"sliding_window": 24}),
}
REWARD_MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2-reward": ("GPT2ForSequenceClassification", GPT2 | {"num_labels": 1}),
    "llama-reward": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 1}),
    "mistral-reward": ("MistralForSequenceClassification", LLAMA | {"num_labels": 1, "sliding_window": 24}),
    "qwen2-reward": ("Qwen2ForSequenceClassification", LLAMA | {"num_labels": 3}),
    "qwen3-reward": ("Qwen3ForSequenceClassification", QWEN3 | {"num_labels": 1}),
    "bloom-reward": ("BloomForSequenceClassification", BLOOM | {"num_labels": 2}),
    "neox-reward": ("GPTNeoXForSequenceClassification", NEOX | {"num_labels": 1}),
    "opt-reward": (
        "OPTForSequenceClassification",
        OPT | {"num_labels": 2, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
    ),
    "gptj-reward": ("GPTJForSequenceClassification", GPTJ | {"num_labels": 1}),
    "gemma2-reward": ("Gemma2ForSequenceClassification", GEMMA2 | {"num_labels": 1}),
    "gemma3-reward": ("Gemma3TextForSequenceClassification", GEMMA | {"num_labels": 1}),
    "phi3-reward": ("Phi3ForSequenceClassification", PHI3 | {"num_labels": 1}),
    "olmo2-reward": ("Olmo2ForSequenceClassification", LLAMA | {"num_labels": 1, "attention_bias": True}),
    "starcoder2-reward": ("Starcoder2ForSequenceClassification", LLAMA | {"num_labels": 1}),
    "falcon-reward": ("FalconForSequenceClassification", FALCON | {"num_labels": 2}),
    "falcon-rw-reward": ("FalconForSequenceClassification", FALCON_RW | {"num_labels": 1}),
}
VARIANTS = [*LANGUAGE_MODELS, *REWARD_MODELS]


def make_model(variant: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A random model in float32 and eval mode, as transformers computes it."""
    architecture, fields = (LANGUAGE_MODELS | REWARD_MODELS)[variant]
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**(fields | config_overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * (0.1 if "emb" in name or "wte" in name else 0.25))
            else:
                tensor.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise)
    return model


def write_checkpoint(
    path: Path | str, variant: str, *, seed: int = 0, tokenizer: bool = True, **config_overrides: Any
) -> Path:
    """Write the variant's checkpoint to directory `path` and return it. `config_overrides` go into its config."""
    make_model(variant, seed=seed, **config_overrides).save_pretrained(path)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return Path(path)


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB tokens that puts <s> before a text; the chat template writes <s> itself."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
    )
