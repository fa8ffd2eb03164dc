"""A LLaMA's matrix products and its attention on this CPU, in bfloat16 and in int8: milliseconds a step as two tables.

    OMP_NUM_THREADS=1 python -m tandem.benchmarks.cpu_int8 [--model random:125m] [--rounds 12] [--context 1024]

Every layer has matrices, K and V of its own, so that they come from memory. A round calls each kind for each layer;
shown is the sum of the layers' least times, in which what else the machine does shows least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch

from tandem.benchmarks.bench.kernels import matrices
from tandem.benchmarks.bench.models import path_of
from tandem.kernels import ops
from tandem.kernels.ops import Activation, Sequences
from tandem.model.config import ModelConfig, read_config
from tandem.model.kv_cache import KVCache
from tandem.server.engine.heap import keep_heap

Calls = list[Callable[[], object]]  # of a step

PAGE = 16
PRODUCTS = ("bfloat16", "int8", "w8a8")
PAGES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "int8": torch.int8}
ROWS = (1, 2, 4, 8, 16, 32, 512)
STEPS = {"1 row": (1, 1), "8": (8, 1), "32": (32, 1), "prompt": (1, None)}  # sequences, rows of each; None: all


def steps_of_products(config: ModelConfig) -> Callable[[int], dict[str, Calls]]:
    """Makes the calls of a step with so many rows."""
    packed: list[tuple[Activation | None, int, tuple[object, ...]]] = []
    for name, (outs, ins) in matrices(config).items():
        activation: Activation | None = "silu_and_mul" if name == "up" else None
        for _ in range(1 if name == "head" else config.layers):
            weight = torch.randn(outs, ins) * ins**-0.5
            rows = ops.quantize_rows(weight)
            forms = (
                ops.pack(weight.bfloat16(), activation),
                ops.pack_int8(*rows, 2, activation),
                ops.pack_int8(*rows, 4, activation),
            )
            packed.append((activation, ins, forms))

    def calls(rows: int) -> dict[str, Calls]:
        found: dict[str, Calls] = {kind: [] for kind in PRODUCTS}
        for activation, ins, forms in packed:
            x = torch.randn(rows, ins).bfloat16()
            for kind, form in zip(PRODUCTS, forms, strict=True):
                product = ops.packed_linear if kind == "bfloat16" else ops.packed_linear_int8
                found[kind].append(lambda f=product, x=x, w=form, a=activation: f(x, w, None, a))  # type: ignore[misc]
        return found

    return calls


def attention(config: ModelConfig, sequences: int, rows: int | None, context: int) -> dict[str, Calls]:
    """The calls of a step whose sequences have `context` tokens, the step's `rows` included."""
    rows = rows or context
    width = -(-context // PAGE)
    table = torch.randperm(sequences * width).view(sequences, width).int()
    starts = torch.arange(0, sequences * rows + 1, rows).int()
    lengths = torch.full((sequences,), context).int()
    step = Sequences(starts, lengths, table, sequences if rows == 1 else 0, rows, context)
    q = torch.randn(sequences * rows, config.heads, config.head_size).bfloat16()
    found, scale = dict[str, Calls](), config.head_size**-0.5
    for kind, dtype in PAGES.items():
        cache = KVCache(config, sequences * width, PAGE, dtype)
        for layer in cache.layers:
            k, v = torch.randn(2, sequences * width * PAGE, config.kv_heads, config.head_size).bfloat16()
            ops.write_kv(k, v, torch.arange(len(k)), layer)
        found[kind] = [lambda layer=layer: ops.paged_attention(q, layer, step, scale) for layer in cache.layers]
    return found


def least(kinds: dict[str, Calls], rounds: int) -> dict[str, float]:
    """Milliseconds of each kind."""
    taken = {kind: [float("inf")] * len(calls) for kind, calls in kinds.items()}
    for _ in range(rounds):
        for kind, calls in kinds.items():
            for index, call in enumerate(calls):
                begin = time.perf_counter()
                call()
                taken[kind][index] = min(taken[kind][index], time.perf_counter() - begin)
    return {kind: 1e3 * sum(times) for kind, times in taken.items()}


def show(what: str, cases: dict[str, dict[str, float]]) -> None:
    print(f"| {what}, ms |", " | ".join(cases), "|")
    print("|---|" + "---|" * len(cases))
    for kind in next(iter(cases.values())):
        times = [(found[kind], found["bfloat16"]) for found in cases.values()]
        print(f"| {kind} |", " | ".join(f"{own:.2f} ({base / own:.2f} ×)" for own, base in times), "|")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:125m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    keep_heap()  # as the server does
    config = read_config(path_of(args.model))
    print(f"{args.model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    with torch.inference_mode():
        calls = steps_of_products(config)
        show("products", {str(rows): least(calls(rows), args.rounds if rows < 100 else 3) for rows in ROWS})
        steps = {
            case: least(attention(config, sequences, rows, args.context), args.rounds if rows else 3)
            for case, (sequences, rows) in STEPS.items()
        }
        show(f"attention to {args.context} tokens", steps)


if __name__ == "__main__":
    main()
