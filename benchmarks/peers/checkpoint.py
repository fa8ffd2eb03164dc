"""Checkpoints that exist to be measured: random weights, real shapes, a tokenizer made of invented words.

`checkpoint("random:125m")` is a Hugging Face directory below ~/.cache/tandem/bench, written on first use and the same
bytes every time, so that every engine of a comparison reads the same files. The tokenizer is a byte-level BPE whose
merges grow invented words letter by letter: each of its tokens from FIRST_WORD on is a word with a space before it, and
*any* sequence of such tokens is the encoding of its own text. A prompt of n tokens is a text of n tokens, on every
server, with no drift.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

VERSION = 1  # of the bytes that are written; part of the directory's name
SEED = 20251123
SPECIAL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_WORD = len(SPECIAL) + 256  # the 256 bytes stand between
LONGEST_WORD = 8  # letters
SPACE = "Ġ"  # how byte-level BPE writes a space

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A LLaMA. `labels`: outputs of a reward head instead of a language model's; 0: none."""

    vocab_size: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    labels: int = 0
    context: int = 2048

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "125m": Shape(32000, 768, 2048, 12, 12, 4),
        "125m-reward": Shape(32000, 768, 2048, 12, 12, 4, labels=1),
        "tiny": Shape(2048, 64, 128, 2, 2, 1),
        "tiny-reward": Shape(2048, 64, 128, 2, 2, 1, labels=1),
    }
)


def checkpoint(name: str, cache: Path | None = None) -> Path:
    """The directory of `random:NAME` (NAME from SHAPES), written if it is not there yet.

    `cache`: below it; None: ~/.cache/tandem/bench. Raises ValueError for a name that is none.
    """
    kind, _, size = name.partition(":")
    if kind != "random" or size not in SHAPES:
        raise ValueError(f"there is no model {name}; there are {', '.join(f'random:{known}' for known in SHAPES)}")
    directory = (cache or cache_directory()) / f"random-{size}-v{VERSION}"
    if not (directory / "config.json").is_file():
        part = directory.with_name(f"{directory.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(part, SHAPES[size])
        try:
            part.rename(directory)
        except OSError:  # another process was first, with the same bytes
            shutil.rmtree(part)
    return directory


def cache_directory() -> Path:
    return Path("~/.cache/tandem/bench").expanduser()


def write(directory: Path, shape: Shape, seed: int = SEED) -> None:
    """The whole checkpoint into a new directory, config.json last."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    save_file(tensors(shape, seed), directory / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": tokenizer(shape.vocab_size),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[UNK_ID],
            "bos_token": SPECIAL[BOS_ID],
            "eos_token": SPECIAL[EOS_ID],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.context,
            "chat_template": CHAT_TEMPLATE,
        },
        "generation_config.json": ids,
        "config.json": config(shape) | ids,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


def config(shape: Shape) -> dict[str, Any]:
    head: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if shape.labels:
        labels = {str(i): f"LABEL_{i}" for i in range(shape.labels)}
        head = {"architectures": ["LlamaForSequenceClassification"], "id2label": labels, "pad_token_id": UNK_ID}
    return {
        **head,
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # as older readers call it
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def tensors(shape: Shape, seed: int = SEED) -> dict[str, Any]:
    """Names and bfloat16 tensors of the checkpoint, drawn one after another from one seeded generator.

    Matrices [outs, ins] have deviation ins ** -0.5 and norms lie about 1, so that activations stay near 1 and greedy
    text varies.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def matrix(outs: int, ins: int) -> torch.Tensor:
        return (torch.randn(outs, ins, generator=generator) * ins**-0.5).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(shape.hidden, generator=generator)).to(torch.bfloat16)

    keys = shape.kv_heads * shape.head_size
    found = {"model.embed_tokens.weight": matrix(shape.vocab_size, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.self_attn.q_proj.weight": matrix(shape.hidden, shape.hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(keys, shape.hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(keys, shape.hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(shape.hidden, shape.hidden),
            f"{prefix}.post_attention_layernorm.weight": norm(),
            f"{prefix}.mlp.gate_proj.weight": matrix(shape.inner, shape.hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(shape.inner, shape.hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(shape.hidden, shape.inner),
        }
    found["model.norm.weight"] = norm()
    head = "score.weight" if shape.labels else "lm_head.weight"
    return found | {head: matrix(shape.labels or shape.vocab_size, shape.hidden)}


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json: the special tokens, the 256 bytes, and words.

    Every merge lengthens a word by one letter, and every word begins with a space; so there is one way to merge a text,
    and each word is split off from the next by the pre-tokenizer.
    """
    letters = byte_letters()
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    merges: list[list[str]] = []
    for word in words(vocab_size - len(vocabulary)):
        vocabulary[word] = len(vocabulary)
        merges.append([word[:-1], word[-1]])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def words(count: int) -> list[str]:
    """Invented words in the order in which they are merged: a word's beginning stands before it.

    Consonants and vowels take turns, so that they can be read. `random()` alone is drawn from, whose sequence Python
    promises to keep.
    """
    draw = random.Random(SEED).random
    kinds = ("bcdfghjklmnprstvwz", "aeiou")
    found = [SPACE + letter for letter in "".join(kinds)]
    known = set(found)
    while len(found) < count:
        stem = found[int(draw() * len(found))]
        if len(stem) > LONGEST_WORD:
            continue
        following = kinds[1] if stem[-1] in kinds[0] else kinds[0]
        word = stem + following[int(draw() * len(following))]
        if word not in known:
            known.add(word)
            found.append(word)
    return found[:count]


def byte_letters() -> list[str]:
    """The printable letter for each byte 0…255 in byte-level BPE (GPT-2's table: what prints stands for itself, the
    other bytes for the letters from 256 on, in order)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
