"""Tiny checkpoints of reward and value models as the tools that train them write them, and what they compute.

Most of these classes are not in transformers: the reference is its decoder and a few lines for the head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import EOS_ID, make_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

D = 64
LINEAR = {"weight": (1, D)}
BIASED = {"weight": (1, D), "bias": (1,)}
MLP = {"0.weight": (48, D), "0.bias": (48,), "2.weight": (1, 48), "2.bias": (1,)}


class RewardFormat(NamedTuple):
    """`variant`: of the decoder. `key` and `head`: names and shapes of the head's tensors."""

    variant: str
    architecture: str
    key: str
    head: Mapping[str, tuple[int, ...]]
    prefix: str | None = None  # before the decoder's tensors; None: as transformers
    file: str = "model.safetensors"
    head_file: str | None = None  # None: with the decoder
    fields: Mapping[str, Any] = {}
    extra: Mapping[str, list[Any]] = {}
    with_lm: bool = False  # the language model's head is there, too


ONE = {"id2label": {"0": "LABEL_0"}}
FORMATS: Mapping[str, RewardFormat] = {
    "score": RewardFormat("llama-gqa", "LlamaForSequenceClassification", "score", LINEAR, fields=ONE),
    "score with bias": RewardFormat("gpt2", "GPT2ForSequenceClassification", "score", BIASED, fields=ONE),
    "Qwen2.5-Math-RM": RewardFormat("qwen2", "Qwen2ForRewardModel", "score", MLP),
    "INF-ORM": RewardFormat("llama-gqa", "INFORMForSequenceClassification", "score", MLP),
    "TRL": RewardFormat("llama-gqa", "LlamaForCausalLM", "v_head.summary", BIASED, with_lm=True),
    "TRL, tied": RewardFormat("gpt2", "GPT2LMHeadModel", "v_head.summary", BIASED),
    "LLaMA-Factory": RewardFormat(
        *("qwen3", "Qwen3ForCausalLM", "v_head.summary", BIASED), head_file="value_head.safetensors", with_lm=True
    ),
    "LLaMA-Factory, .bin": RewardFormat(
        *("llama-gqa", "LlamaForCausalLM", "v_head.summary", BIASED), head_file="value_head.bin", with_lm=True
    ),
    "GRM": RewardFormat("gemma2", "Gemma2ForCausalLM", "v_head.summary", MLP, with_lm=True),
    "DeepSpeed-Chat": RewardFormat(
        *("opt-post", "OPTForCausalLM", "v_head", {"weight": (1, 24)}, "rwtransformer.", "pytorch_model.bin"),
        fields={"pad_token_id": EOS_ID},
    ),
    "trlx": RewardFormat("gptj", "GPTJForCausalLM", "v_head", LINEAR, "transformer.", "pytorch_model.bin"),
    "Starling": RewardFormat(
        *("llama-gqa", "LlamaForCausalLM", "v_head", LINEAR, "transformer."), fields={"pad_token_id": 0}
    ),
    "OpenRLHF": RewardFormat(
        *("mistral", "RewardModel", "value_head", LINEAR),
        fields={"value_head_prefix": "value_head", "mean": 0.5, "std": 2.0},
    ),
    "OpenRLHF critic": RewardFormat("neox", "CriticModel", "score", LINEAR, fields={"value_head_prefix": "score"}),
    "UltraRM": RewardFormat("llama-gqa", "LlamaRewardModel", "regression_head", LINEAR),
    "Eurus": RewardFormat("mistral", "EurusRewardModel", "regression_head", LINEAR),
    "Beaver": RewardFormat(
        *("llama-gqa", "LlamaModelForScore", "score_head", BIASED),
        fields={"do_normalize": True, "score_type": "reward"},
        extra={"normalizer.mean": [1.5], "normalizer.var": [4.0], "normalizer.count": [7]},
    ),
    "OpenAssistant": RewardFormat(
        *("neox", "GPTNeoXRewardModel", "out_proj", BIASED),
        fields={"pooling": "mean", "model_type": "gpt_neox_reward_model"},
    ),
    "reward_head": RewardFormat("bloom", "BloomModel", "reward_head", LINEAR),
}


def head_tensors(format: RewardFormat, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{format.key}.{name}": 0.25 * torch.randn(shape, generator=generator) for name, shape in format.head.items()
    }


def write_format(path: Path, name: str, seed: int = 7, **fields: Any) -> Path:
    """The checkpoint in directory `path`, which is returned. `fields` go into its config."""
    format = FORMATS[name]
    model = make_model(format.variant)
    prefix = f"{model.base_model_prefix}." if format.prefix is None else format.prefix
    tensors = {prefix + name: tensor for name, tensor in model.base_model.state_dict().items()}
    if format.with_lm:
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
    tensors |= {name: torch.tensor(numbers) for name, numbers in format.extra.items()}
    path.mkdir(parents=True, exist_ok=True)
    head = head_tensors(format, seed)
    if format.head_file is None:
        tensors |= head
    else:
        write(path / format.head_file, head)
    write(path / format.file, tensors)
    config = model.config.to_dict() | {"architectures": [format.architecture]} | format.fields | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return path


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    if file.suffix == ".bin":
        torch.save(dict(tensors), file)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)


def hidden_states(name: str, ids: list[int]) -> Tensor:
    """[n, D] of transformers' decoder."""
    model: PreTrainedModel = make_model(FORMATS[name].variant)
    with torch.inference_mode():
        return model.base_model(torch.tensor([ids])).last_hidden_state[0]


def apply_head(name: str, hidden: Tensor, seed: int = 7) -> Tensor:
    """hidden [n, D] -> a score of each row [n]."""
    format = FORMATS[name]
    tensors = head_tensors(format, seed)
    weights = [name for name in tensors if name.endswith("weight")]
    for index, weight in enumerate(weights):
        hidden = hidden.relu() if index else hidden
        hidden = torch.nn.functional.linear(hidden, tensors[weight], tensors.get(weight.replace("weight", "bias")))
    return hidden[:, 0]
