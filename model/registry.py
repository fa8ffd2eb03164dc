"""The architectures that can be served. This is the only list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from . import bloom, falcon, gemma, gpt2, gpt_neox, gptj, llama, olmo2, opt, phi3, starcoder2
from .config import ModelConfig
from .fields import Fields

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
Head = Literal["lm", "score", "value", "none"]  # none: an embedding model


class Family(NamedTuple):
    """`configure(fields, architecture, labels)` reads config.json; `decoder(config, place)` has unfilled weights.

    `older_head`: what checkpoints may call `lm_head`.
    """

    configure: Callable[[Fields, str, int], ModelConfig]
    decoder: type[Decoder]
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

FAMILIES: Mapping[str, Family] = MappingProxyType(  # by the first part of an architecture's name
    {
        "GPT2": GPT2,
        "Llama": LLAMA,
        "Mistral": LLAMA,
        "Qwen2": LLAMA,
        "Qwen3": LLAMA,
        "Bloom": BLOOM,
        "GPTNeoX": GPT_NEOX,
        "OPT": OPT,
        "GPTJ": GPTJ,
        "Gemma2": GEMMA,
        "Gemma3": GEMMA,
        "Phi3": PHI3,
        "Falcon": FALCON,
        "Olmo2": OLMO2,
        "Starcoder2": STARCODER2,
    }
)
# The rest of the name, where it is not ForCausalLM, ForSequenceClassification or Model.
OTHERS: Mapping[tuple[str, Head], str] = MappingProxyType(
    {
        ("GPT2", "lm"): "LMHeadModel",
        ("Gemma3", "score"): "TextForSequenceClassification",
        ("Gemma3", "none"): "TextModel",
    }
)
ENDINGS: Mapping[Head, str] = MappingProxyType(
    {"lm": "ForCausalLM", "score": "ForSequenceClassification", "none": "Model"}
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        name + OTHERS.get((name, head), ending): Architecture(family, head)
        for name, family in FAMILIES.items()
        for head, ending in ENDINGS.items()
    }
    | {gemma.WITH_IMAGES: Architecture(GEMMA, "lm")}
)
# Reward and value models whose classes come from elsewhere: the family whose decoder they have, None where `model_type`
# says which, and what their head gives. How the head lies on disk: `head_formats`.
FOREIGN: Mapping[str, tuple[str | None, Head]] = MappingProxyType(
    {
        "RewardModel": (None, "score"),  # OpenRLHF
        "CriticModel": (None, "value"),
        "LlamaRewardModel": ("Llama", "score"),  # UltraRM
        "EurusRewardModel": ("Mistral", "score"),
        "LlamaModelForScore": ("Llama", "score"),  # PKU Beaver
        "LlamaForScore": ("Llama", "score"),
        "GPTNeoXRewardModel": ("GPTNeoX", "score"),  # OpenAssistant
        "Qwen2ForRewardModel": ("Qwen2", "score"),  # Qwen2.5-Math-RM
        "INFORMForSequenceClassification": ("Llama", "score"),  # INF-ORM
    }
)
MODEL_TYPES: Mapping[str, str] = MappingProxyType({name.lower(): name for name in FAMILIES})  # without _ and "text"


def read_architecture(fields: Fields) -> tuple[str, Architecture]:
    """The architecture that a config.json names, and its entry; of a foreign one, the one that it is served as."""
    names = fields.strings("architectures") or []
    found = [name for name in names if name in ARCHITECTURES or name in FOREIGN]
    if len(found) != 1:
        raise fields.error("architectures", "one of " + ", ".join([*ARCHITECTURES, *FOREIGN]))
    name = found[0]
    if name in ARCHITECTURES:
        return name, ARCHITECTURES[name]
    family, head = FOREIGN[name]
    if family is None:
        kind = str(fields.get("model_type")).replace("_", "").removesuffix("text")
        if kind not in MODEL_TYPES:
            raise fields.error("model_type", "one of " + ", ".join(MODEL_TYPES))
        family = MODEL_TYPES[kind]
    name = family + OTHERS.get((family, "score"), ENDINGS["score"])
    return name, ARCHITECTURES[name]._replace(head=head)
