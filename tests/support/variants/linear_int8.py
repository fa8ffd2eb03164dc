from __future__ import annotations

from collections.abc import Sequence

from aot import ARCHS, Variant

from tandem.kernels.triton.launch import warps
from tandem.kernels.triton.linear_int8 import (
    AHEAD,
    BLOCK,
    RUN,
    STRIPS,
    TILES,
    _dequantize_kernel,
    _rows_kernel,
)
from tandem.kernels.triton.linear_tile import GROUP, MERGED, _merge_kernel, _tile_kernel

COUNTS = ("outs", "ins", "x_stride")
ELEMENTS = {"i8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def _rows(rows: int, dtype: str, activation: str | None = None, bias: bool = False) -> Variant:
    strip = STRIPS[rows]
    pointers = {"x": f"*{dtype}", "values": "*i8", "scale": "*fp32", "out": f"*{dtype}"}
    pointers |= {"bias": f"*{dtype}"} if bias else {}
    blocks = {
        "ROWS": rows,
        "BLOCK_OUT": strip.out // 2 if activation == "silu_and_mul" else strip.out,
        "BLOCK": strip.columns,
        "RUN": RUN,
        "AHEAD": AHEAD,
        "ACTIVATION": activation,
    }
    return Variant(
        f"{rows} row{'s' * (rows > 1)} {dtype} {activation or ''}{' bias' * bias}",
        _rows_kernel,
        pointers | dict.fromkeys(COUNTS, "i32") | ({"rows": "i32"} if rows > 1 else {}),
        blocks | ({} if bias else {"bias": None}) | ({"rows": 1} if rows == 1 else {}),
        [*pointers, *COUNTS],
        num_warps=strip.warps,
        num_stages=AHEAD,
        max_registers=112,  # 9 programs on a processor
        sass=("LDGSTS.128", "LDS.128"),
        absent=("LDGSTS.64", "LDG.U8", "I2F.S8"),
    )


def _tiles(
    dtype: str,
    rows: int,
    activation: str | None = None,
    bias: bool = False,
    divided: bool = False,
    archs: Sequence[int] = (90,),
) -> list[Variant]:
    """The tile for so many rows on each architecture."""
    pointers = {"x": f"*{dtype}", "weight": "*i8", "scale": "*fp32", "out": f"*{'bf16' if dtype == 'i8' else dtype}"}
    pointers |= {"bias": pointers["out"]} if bias else {}
    pointers |= {"x_scale": "*fp32"} if dtype == "i8" else {}
    pointers |= {"sums": "*i32" if dtype == "i8" else "*fp32"} if divided else {}
    absent = {"x_scale", "bias", "sums"} - pointers.keys()
    found: list[Variant] = []
    for arch in archs:
        table = TILES[max(known for known in TILES if known <= arch)]
        tile = table[ELEMENTS[dtype]][rows]
        blocks = {
            "BLOCK_ROWS": tile.rows,
            "BLOCK_OUT": tile.out // 2 if activation == "silu_and_mul" else tile.out,
            "BLOCK": tile.columns,
            "GROUP": GROUP,
            "ACTIVATION": activation,
        }
        slow = ("I2F.S8",) if dtype != "bf16" or arch >= 90 else ()  # conversions to bfloat16 came with sm_90
        product = "IMMA" if dtype == "i8" else "HMMA"
        if arch == 90 and tile.rows >= 64:
            product = product.replace("MMA", "GMMA")
        found.append(
            Variant(
                f"{rows} rows {dtype} {activation or ''}{' bias' * bias}{' divided' * divided}",
                _tile_kernel,
                pointers | dict.fromkeys(("rows", "share", *COUNTS), "i32"),
                blocks | dict.fromkeys(absent),
                [*pointers, "share", *COUNTS],
                num_warps=tile.warps,
                num_stages=tile.stages,
                options={"enable_fp_fusion": dtype != "i8"},
                archs=[arch],
                max_stack=8 if arch == 100 and divided else 0,  # two registers, outside of the loop
                sass=("LDGSTS.128",),
                sass_on={} if dtype == "fp32" or arch == 100 else {arch: (product,)},
                absent=("LDG.U8",) if dtype == "fp32" else ("LDG.U8", "LDGSTS.64", *slow),
            )
        )
    return found


def _merge(dtype: str, sums: str, parts: int, activation: str | None = None) -> Variant:
    pointers = {"sums": f"*{sums}", "scale": "*fp32", "out": f"*{dtype}"}
    pointers |= {"x_scale": "*fp32"} if sums == "i32" else {}
    return Variant(
        f"merge {parts} {sums} to {dtype} {activation or ''}",
        _merge_kernel,
        pointers | {"rows": "i32", "outs": "i32"},
        {"PARTS": parts, "BLOCK": MERGED, "ACTIVATION": activation}
        | dict.fromkeys({"x_scale", "bias"} - pointers.keys()),
        [*pointers, "outs"],
        num_warps=warps(MERGED, per_thread=4),
        max_registers=64,
        sass=("LDG.128",),
    )


VARIANTS = [
    _rows(1, "bf16"),
    _rows(1, "fp16", "gelu_tanh", bias=True),
    _rows(1, "bf16", "silu_and_mul"),
    _rows(2, "bf16"),
    *_tiles("bf16", 16, archs=ARCHS),
    *_tiles("fp16", 16, archs=ARCHS),
    *_tiles("bf16", 16, "silu_and_mul"),
    *_tiles("fp16", 16, divided=True),
    *_tiles("bf16", 64, archs=ARCHS),
    *_tiles("fp16", 64, "silu_and_mul", bias=True),
    *_tiles("bf16", 128, archs=ARCHS),
    *_tiles("fp16", 128, bias=True),
    *_tiles("fp32", 32),
    *_tiles("i8", 16, archs=ARCHS),
    *_tiles("i8", 64, divided=True, archs=ARCHS),
    *_tiles("i8", 512, bias=True),
    *_tiles("i8", 1024),
    _merge("bf16", "fp32", 4),
    _merge("bf16", "i32", 4),
    _merge("fp16", "fp32", 2, "silu_and_mul"),
    Variant(
        "dequantize bf16",
        _dequantize_kernel,
        {"values": "*i8", "scale": "*fp32", "out": "*bf16", "ins": "i32"},
        {"BLOCK": BLOCK},
        ["values", "out", "ins"],
        num_warps=warps(BLOCK),
        max_registers=64,
        sass=("LDG.128", "STG.128"),
    ),
]
