"""Steps of a 125M LLaMA on this CPU with the C++ kernels and with PyTorch alone: tokens per second as a table.

    OMP_NUM_THREADS=1 python -m tandem.benchmarks.cpu_kernels [--rounds 4] [--context 256]

Every round measures each kind and case once, so that what else the machine does falls on all; shown are medians. With
one thread it is that thread's processor time, without what it waited for others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from types import MappingProxyType
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tandem.benchmarks.peers.checkpoint import checkpoint
from tandem.kernels import ops
from tandem.kernels.cpu import attention, int8, product, rows
from tandem.kernels.ops import Sequences
from tandem.model.batch import Batch
from tandem.model.kv_cache import KVCache
from tandem.model.load import DType, load_model
from tandem.model.model import Model
from tandem.model.quantization import WantedScheme
from tandem.server.engine.heap import keep_heap

PAGE = 16


class Kind(NamedTuple):
    dtype: DType
    quantization: WantedScheme = "none"
    int8_kv: bool = False
    definitions: bool = False  # whether PyTorch's compute


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "float32": Kind("float32"),
        "bfloat16": Kind("bfloat16"),
        "int8": Kind("bfloat16", "int8"),
        "int8, int8 KV": Kind("bfloat16", "int8", int8_kv=True),
        "w8a8": Kind("bfloat16", "w8a8"),
        "w8a8, int8 KV": Kind("bfloat16", "w8a8", int8_kv=True),
        "float32, PyTorch": Kind("float32", definitions=True),
        "bfloat16, PyTorch": Kind("bfloat16", definitions=True),
        "float16, PyTorch": Kind("float16", definitions=True),
    }
)
CASES: Mapping[str, tuple[int, int]] = MappingProxyType(  # sequences, tokens of each
    {"1 row": (1, 1), "2": (2, 1), "4": (4, 1), "16": (16, 1), "32": (32, 1), "prefill 512": (1, 512)}
)


@contextmanager
def kernels(definitions: bool) -> Iterator[None]:
    """Inside, with `definitions`, this process computes as where the C++ kernels could not be built."""
    with ExitStack() as stack:
        for module in (attention, int8, product, rows) if definitions else ():
            stack.enter_context(patch.object(module, "native", lambda: None))
        yield


def step(model: Model, kind: Kind, sequences: int, tokens: int, context: int) -> Callable[[], Tensor]:
    """One step: a token for each sequence behind `context` others, or a prompt; with the head for each last row."""
    before = context if tokens == 1 else 0
    width = -(-(before + tokens) // PAGE)
    cache = KVCache(model.config, sequences * width, PAGE, torch.int8 if kind.int8_kv else model.dtype)
    heads = model.config.kv_heads, model.config.head_size
    for layer in cache.layers:
        k, v = torch.randn(2, sequences * width * PAGE, *heads).to(model.dtype)
        ops.write_kv(k, v, torch.arange(len(k)), layer)
    tables = torch.arange(sequences * width, dtype=torch.int32).view(sequences, width)
    positions = torch.arange(before, before + tokens).repeat(sequences)
    pages = tables.repeat_interleave(tokens, 0).gather(1, (positions // PAGE).unsqueeze(1))[:, 0]
    starts = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
    lengths = torch.full((sequences,), before + tokens, dtype=torch.int32)
    decodes = sequences if tokens == 1 else 0
    given = Sequences(starts, lengths, tables, decodes, tokens, before + tokens)
    ids = torch.randint(0, model.config.vocab_size, (sequences * tokens,))
    slots = pages * PAGE + positions % PAGE

    def run() -> Tensor:
        with kernels(kind.definitions):
            batch = Batch(ids, positions, slots, given._replace(memo={}))
            return model.logits(model.forward(batch, cache)[tokens - 1 :: tokens])

    return run


def steps(context: int, kinds: list[str]) -> dict[tuple[str, str], Callable[[], Tensor]]:
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for name in kinds:
        kind = KINDS[name]
        with kernels(kind.definitions):
            model = load_model(checkpoint("random:125m"), dtype=kind.dtype, quantization=kind.quantization)
        for case, (sequences, tokens) in CASES.items():
            found[name, case] = step(model, kind, sequences, tokens, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--kinds", help="of the table's rows, separated by semicolons; all without it")
    args = parser.parse_args()
    keep_heap()  # as the server does
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    kinds = args.kinds.split(";") if args.kinds else list(KINDS)
    runs = steps(args.context, kinds)
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
