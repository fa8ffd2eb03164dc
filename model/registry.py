"""The architectures that can be served. This is the only list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from . import bloom, falcon, gemma, gpt2, gpt_neox, gptj, llama, olmo2, opt, phi3, starcoder2
from .config import ModelConfig
from .fields import Fields
from .slots import Place

Decoder = (
    bloom.BloomDecoder
    | falcon.FalconDecoder
    | gemma.GemmaDecoder
    | gpt2.GPT2Decoder
    | gpt_neox.GPTNeoXDecoder
    | gptj.GPTJDecoder
    | llama.LlamaDecoder
    | olmo2.Olmo2Decoder
    | opt.OPTDecoder
    | starcoder2.Starcoder2Decoder
)
Head = Literal["lm", "score"]


class Family(NamedTuple):
    """`configure(fields, architecture, labels)` reads config.json; `decoder(config, place)` has unfilled weights.

    `older_head`: what checkpoints may call `lm_head`.
    """

    configure: Callable[[Fields, str, int], ModelConfig]
    decoder: Callable[[ModelConfig, Place], Decoder]
    older_head: str | None = None


class Architecture(NamedTuple):
    """A name that config.json gives under `architectures`: a family's decoder with a head."""

    family: Family
    head: Head


GPT2 = Family(gpt2.configure, gpt2.GPT2Decoder)
LLAMA = Family(llama.configure, llama.LlamaDecoder)
BLOOM = Family(bloom.configure, bloom.BloomDecoder)
GPT_NEOX = Family(gpt_neox.configure, gpt_neox.GPTNeoXDecoder, older_head="embed_out")
OPT = Family(opt.configure, opt.OPTDecoder)
GPTJ = Family(gptj.configure, gptj.GPTJDecoder)
GEMMA = Family(gemma.configure, gemma.GemmaDecoder)
PHI3 = Family(phi3.configure, llama.LlamaDecoder)
FALCON = Family(falcon.configure, falcon.FalconDecoder)
OLMO2 = Family(olmo2.configure, olmo2.Olmo2Decoder)
STARCODER2 = Family(starcoder2.configure, starcoder2.Starcoder2Decoder)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "GPT2LMHeadModel": Architecture(GPT2, "lm"),
        "GPT2ForSequenceClassification": Architecture(GPT2, "score"),
        "LlamaForCausalLM": Architecture(LLAMA, "lm"),
        "LlamaForSequenceClassification": Architecture(LLAMA, "score"),
        "MistralForCausalLM": Architecture(LLAMA, "lm"),
        "MistralForSequenceClassification": Architecture(LLAMA, "score"),
        "Qwen2ForCausalLM": Architecture(LLAMA, "lm"),
        "Qwen2ForSequenceClassification": Architecture(LLAMA, "score"),
        "Qwen3ForCausalLM": Architecture(LLAMA, "lm"),
        "Qwen3ForSequenceClassification": Architecture(LLAMA, "score"),
        "BloomForCausalLM": Architecture(BLOOM, "lm"),
        "BloomForSequenceClassification": Architecture(BLOOM, "score"),
        "GPTNeoXForCausalLM": Architecture(GPT_NEOX, "lm"),
        "GPTNeoXForSequenceClassification": Architecture(GPT_NEOX, "score"),
        "OPTForCausalLM": Architecture(OPT, "lm"),
        "OPTForSequenceClassification": Architecture(OPT, "score"),
        "GPTJForCausalLM": Architecture(GPTJ, "lm"),
        "GPTJForSequenceClassification": Architecture(GPTJ, "score"),
        "Gemma2ForCausalLM": Architecture(GEMMA, "lm"),
        "Gemma2ForSequenceClassification": Architecture(GEMMA, "score"),
        "Gemma3ForCausalLM": Architecture(GEMMA, "lm"),
        "Gemma3TextForSequenceClassification": Architecture(GEMMA, "score"),
        "Phi3ForCausalLM": Architecture(PHI3, "lm"),
        "Phi3ForSequenceClassification": Architecture(PHI3, "score"),
        "FalconForCausalLM": Architecture(FALCON, "lm"),
        "FalconForSequenceClassification": Architecture(FALCON, "score"),
        "Olmo2ForCausalLM": Architecture(OLMO2, "lm"),
        "Olmo2ForSequenceClassification": Architecture(OLMO2, "score"),
        "Starcoder2ForCausalLM": Architecture(STARCODER2, "lm"),
        "Starcoder2ForSequenceClassification": Architecture(STARCODER2, "score"),
    }
)


def read_architecture(fields: Fields) -> tuple[str, Architecture]:
    """The architecture that a config.json names, and its entry."""
    names = fields.strings("architectures") or []
    found = [(name, ARCHITECTURES[name]) for name in names if name in ARCHITECTURES]
    if len(found) != 1:
        raise fields.error("architectures", "one of " + ", ".join(ARCHITECTURES))
    return found[0]
