"""A Hugging Face LLaMA checkpoint as a GGUF file, for llama.cpp. Runs in its environment (`gguf`, numpy).

    python gguf_file.py CHECKPOINT [--type bf16|f16|q8_0]     # prints the file's path

The file lies in the cache (`converted.place`) and is written once. Only what `checkpoint.py` writes is meant to pass:
one architecture, one safetensors file, a byte-level BPE tokenizer; anything else ends with a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converted import place

TYPES = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMAL, CONTROL = 1, 3  # kinds of tokens


def write(checkpoint: Path, kind: str) -> Path:
    """The GGUF file of `checkpoint` with matrices of that type; norms are float32, as llama.cpp wants them."""
    target = place(checkpoint, kind).with_suffix(".gguf")
    if target.exists():
        return target
    import gguf

    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(f"{checkpoint}: only LlamaForCausalLM is written as GGUF here, not {config['architectures']}")
    part = target.with_suffix(f".{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(checkpoint.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{TYPES[kind]}"))
    add_tokenizer(writer, checkpoint)
    matrix_type = getattr(gguf.GGMLQuantizationType, TYPES[kind])
    for name, values in tensors(checkpoint / "model.safetensors"):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, config["head_dim"])
        wanted = matrix_type if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, wanted)
        writer.add_tensor(gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
    return target


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)  # model.layers.N.…
    return f"blk.{layer}.{LAYER_NAMES[inner]}.{kind}"


def interleaved(values: Any, head_size: int) -> Any:
    """Rows of q and k [heads * head_size, hidden] as llama.cpp rotates them: with pairs as neighbours, where the
    checkpoint has the second of each pair half a head later."""
    rows, columns = values.shape
    return values.reshape(rows // head_size, 2, head_size // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays of a safetensors file of bfloat16 tensors (numpy itself has no bfloat16)."""
    import numpy as np

    data = np.memmap(file, np.uint8, "r")
    size = int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{file}: {name} is {entry['dtype']}, not BF16")
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        halves = np.frombuffer(data[begin:end].tobytes(), np.uint16).astype(np.uint32)
        yield name, (halves << 16).view(np.float32).reshape(entry["shape"])


def add_tokenizer(writer: Any, checkpoint: Path) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_unk_token_id(vocabulary[config["unk_token"]])
    writer.add_bos_token_id(vocabulary[config["bos_token"]])
    writer.add_eos_token_id(vocabulary[config["eos_token"]])
    writer.add_add_bos_token(config["add_bos_token"])
    writer.add_chat_template(config["chat_template"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--type", choices=TYPES, default="bf16")
    options = parser.parse_args()
    print(write(options.checkpoint, options.type))
