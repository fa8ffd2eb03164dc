"""Steps of a 125M LLaMA with random weights on this CPU, by dtype and mode: tokens per second as a table.

    OMP_NUM_THREADS=1 python -m tandem.benchmarks.cpu_dtypes [--rounds 4] [--context 256]

Every round measures each kind and case once, so that what else the machine does falls on all; shown are medians. With
one thread it is that thread's processor time, without what it waited for others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tandem.kernels.ops import Sequences
from tandem.model.batch import Batch
from tandem.model.config import ModelConfig, read_config
from tandem.model.kv_cache import KVCache
from tandem.model.load import random_model
from tandem.model.model import Model
from tandem.server.engine.heap import keep_heap

CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 768,
"intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}"""
PAGE = 16
# What a kind asks `random_model` for, and whether attention is in the fixed order, too.
KINDS: Mapping[str, tuple[dict[str, Any], bool]] = MappingProxyType(
    {
        "float32": ({"dtype": "float32"}, False),
        "float32, float16 copy": ({"dtype": "float32", "decode_copy": "fp16"}, False),
        "bfloat16": ({"dtype": "bfloat16"}, False),
        "float16": ({"dtype": "float16"}, False),
        "float32, matrices deterministic": ({"dtype": "float32", "deterministic": True}, False),
        "bfloat16, matrices deterministic": ({"dtype": "bfloat16", "deterministic": True}, False),
        "float32, deterministic": ({"dtype": "float32", "deterministic": True}, True),
        "bfloat16, deterministic": ({"dtype": "bfloat16", "deterministic": True}, True),
    }
)
CASES: Mapping[str, tuple[int, int]] = MappingProxyType(  # sequences, tokens of each
    {"1 row": (1, 1), "2": (2, 1), "4": (4, 1), "16": (16, 1), "32": (32, 1), "prefill 512": (1, 512)}
)


def step(model: Model, sequences: int, tokens: int, context: int, fixed_order: bool) -> Callable[[], Tensor]:
    """One step: a token for each sequence behind `context` others, or a prompt; with the head for each last row."""
    before = context if tokens == 1 else 0
    width = -(-(before + tokens) // PAGE)
    cache = KVCache(model.config, sequences * width, PAGE, model.dtype)
    for layer in cache.layers:
        layer.k.normal_()
        layer.v.normal_()
    tables = torch.arange(sequences * width, dtype=torch.int32).view(sequences, width)
    positions = torch.arange(before, before + tokens).repeat(sequences)
    pages = tables.repeat_interleave(tokens, 0).gather(1, (positions // PAGE).unsqueeze(1))[:, 0]
    starts = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
    lengths = torch.full((sequences,), before + tokens, dtype=torch.int32)
    decodes = sequences if tokens == 1 else 0
    given = Sequences(starts, lengths, tables, decodes, tokens, before + tokens, deterministic=fixed_order)
    ids = torch.randint(0, model.config.vocab_size, (sequences * tokens,))
    slots = pages * PAGE + positions % PAGE

    def run() -> Tensor:
        batch = Batch(ids, positions, slots, given._replace(memo={}))
        return model.logits(model.forward(batch, cache)[tokens - 1 :: tokens])

    return run


def steps(config: ModelConfig, context: int, kinds: list[str]) -> dict[tuple[str, str], Callable[[], Tensor]]:
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for kind in kinds:
        options, fixed_order = KINDS[kind]
        model = random_model(config, **options)
        for case, (sequences, tokens) in CASES.items():
            found[kind, case] = step(model, sequences, tokens, context, fixed_order)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--kinds", help="of the table's rows, separated by semicolons; all without it")
    args = parser.parse_args()
    keep_heap()  # as the server does
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(CONFIG)
        config = read_config(Path(directory))
    kinds = args.kinds.split(";") if args.kinds else list(KINDS)
    runs = steps(config, args.context, kinds)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(args.rounds + 1):
        for key, run in runs.items():
            begin = clock()
            run()
            if turn:  # the first is a warm-up
                taken[key].append(clock() - begin)
    print(f"| tokens/s, {torch.get_num_threads()} thread(s), torch {torch.__version__} |", " | ".join(CASES), "|")
    print("|---|" + "---|" * len(CASES))
    for kind in kinds:
        speeds = [sequences * tokens / median(taken[kind, case]) for case, (sequences, tokens) in CASES.items()]
        print(f"| {kind} |", " | ".join(f"{speed:.0f}" for speed in speeds), "|")


if __name__ == "__main__":
    main()
