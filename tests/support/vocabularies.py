"""Small tokenizers of the three kinds that real checkpoints have, written as checkpoints write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.\n",
    "hello world, hello there; it's the world's 1234567890 things that we'll see!\n\n",
    "def add(a, b):\n    return a + b\n\tprint(add(1, 2))\n",
    "你好，世界。今天天气很好。 Größe naïve café ünïcödé 🙂",
    "System user assistant Stop stopping stops Observation: none.",
] * 3

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(tokenizer: Tokenizer, size: int, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def save(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def gpt2_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = train(tokenizer, 420, pre_tokenizers.ByteLevel.alphabet())
    return vocabulary | {"<|endoftext|>": len(vocabulary)}, merges


def gpt2(path: Path, **config: Any) -> Path:
    vocabulary, merges = gpt2_parts()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return save(path, tokenizer, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024} | config)


def gpt2_files(path: Path) -> Path:
    """The two files of the first GPT-2 checkpoints, and a config.json that names the family."""
    vocabulary, merges = gpt2_parts()
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return path


def llama(path: Path, **config: Any) -> Path:
    """SentencePiece-like: ▁ for a space, <0xE4> for bytes of rare characters, BOS from the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learnt, merges = train(tokenizer, 320, [])
    kept = {token for token in learnt if all(c.isascii() or c == "▁" for c in token)}  # the rest falls back to bytes
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(kept)]
    vocabulary = {token: i for i, token in enumerate(names)}
    merges = [(a, b) for a, b in merges if a in kept and b in kept and a + b in kept]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokens = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "unk_token": "<unk>"}
    defaults = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    return save(path, tokenizer, defaults | tokens | config)


def qwen(path: Path, **config: Any) -> Path:
    """Byte-level with NFC and its own split, ChatML tokens added behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    vocabulary, merges = train(tokenizer, 400, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>"])
    listed = {
        str(len(vocabulary) + i): {"content": token, "special": i < 3, "normalized": False}
        for i, token in enumerate([*special, "<think>", "</think>"])
    }
    defaults = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": listed,
    }
    return save(path, tokenizer, defaults | config)


KINDS = {"gpt2": gpt2, "llama": llama, "qwen": qwen}
