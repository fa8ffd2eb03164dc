from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.lora import BLOCKS, CHUNK, OUTS, RANKS, ROWS, _expand_kernel, _shrink_kernel


def _shrink(dtype: str, lines: int) -> Variant:
    """An adapter's part of A as it is read: 128 bytes of a row by the threads beside each other."""
    wide = dtype == "fp32"
    block = BLOCKS[4 if wide else 2]
    return Variant(
        f"shrink {dtype} {lines} lines",
        _shrink_kernel,
        {"x": f"*{dtype}", "a": f"*{dtype}", "slots": "*i64", "partial": "*fp32"}
        | dict.fromkeys(("rows", "ins", "lines", "x_stride"), "i32"),
        {"BLOCK_ROWS": ROWS, "BLOCK_LINES": lines, "BLOCK": block.columns, "CHUNK": CHUNK},
        ["x", "a", "slots", "partial", "ins", "lines", "x_stride"],
        num_stages=block.stages,
        max_registers=168,
        sass=("LDGSTS.128",),
        sass_on={} if wide else {80: ("HMMA",), 89: ("HMMA",), 90: ("HMMA",)},
        absent=("HMMA.TF32",),
    )


def _expand(dtype: str, rank: int, matrices: int, chunks: int) -> Variant:
    return Variant(
        f"expand {dtype} rank {rank} × {matrices}",
        _expand_kernel,
        {"partial": "*fp32", "b": f"*{dtype}", "slots": "*i64", "y": f"*{dtype}"}
        | dict.fromkeys(("rows", "second", "third", "outs", "rank", "y_stride"), "i32"),
        {"MATRICES": matrices, "CHUNKS": chunks, "BLOCK_ROWS": ROWS, "BLOCK_RANK": min(rank, RANKS), "BLOCK_OUT": OUTS},
        ["partial", "b", "slots", "y", "second", "third", "outs", "rank", "y_stride"],
        max_registers=168,
        sass=("STG",),
        absent=("HMMA.TF32",),
    )


VARIANTS = [
    _shrink("bf16", 16),
    _shrink("fp16", 64),
    _shrink("fp32", 32),
    _expand("bf16", 16, 3, 8),
    _expand("fp16", 64, 1, 28),
    _expand("fp32", 16, 2, 2),
]
