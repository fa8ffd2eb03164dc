from __future__ import annotations

from collections.abc import Mapping

from aot import Variant

from tandem.kernels.triton.linear import STRIPS, TILES, _rows_kernel
from tandem.kernels.triton.linear_tile import GROUP, Tile, _tile_kernel


def _sizes(dtype: str, bias: bool) -> tuple[list[str], dict[str, str], Mapping[str, object]]:
    pointers = ["x", "weight", "out"] + ["bias"] * bias
    counts = dict.fromkeys(("outs", "ins", "x_stride"), "i32")
    return pointers, {name: f"*{dtype}" for name in pointers} | counts, {} if bias else {"bias": None}


def _rows(rows: int, dtype: str, activation: str | None = None, bias: bool = False) -> Variant:
    pointers, signature, absent = _sizes(dtype, bias)
    strip = STRIPS[rows]
    blocks = {
        "ROWS": rows,
        "BLOCK_OUT": strip.out // 2 if activation == "silu_and_mul" else strip.out,
        "BLOCK": strip.columns,
        "ACTIVATION": activation,
    }
    return Variant(
        f"{rows} row{'s' * (rows > 1)} {dtype} {activation or ''}{' bias' * bias}",
        _rows_kernel,
        signature | ({"rows": "i32"} if rows > 1 else {}),
        blocks | absent | ({"rows": 1} if rows == 1 else {}),
        [*pointers, "outs", "ins", "x_stride"],
        num_warps=strip.warps,
        max_registers=80 if rows == 1 else 136,  # 6 programs on a processor; 3
        sass=("LDG.EF.128", "LDG.EL.128"),
        absent=("LDG.EF.64", "LDG.EF.U16"),
    )


def _tile(tile: Tile, dtype: str, label: str, bias: bool = False) -> Variant:
    pointers, signature, absent = _sizes(dtype, bias)
    wide = dtype == "fp32"
    return Variant(
        f"tile {dtype} {label}",
        _tile_kernel,
        signature | {"rows": "i32", "share": "i32"},
        {"BLOCK_ROWS": tile.rows, "BLOCK_OUT": tile.out, "BLOCK": tile.columns, "GROUP": GROUP}
        | dict.fromkeys(("x_scale", "scale", "sums", "ACTIVATION"))
        | absent,
        [*pointers, "outs", "ins", "share", "x_stride"],
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=128,
        sass=("LDGSTS.128", "STG.128"),
        sass_on={} if wide else {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",)},
        absent=("HMMA.TF32",),
    )


VARIANTS = [
    _rows(1, "bf16"),
    _rows(1, "fp16", bias=True),
    _rows(1, "bf16", "silu_and_mul"),
    _rows(1, "fp16", "gelu_tanh", bias=True),
    _rows(2, "bf16"),
    _rows(4, "bf16"),
    _rows(4, "fp16", "silu_and_mul", bias=True),
    _tile(TILES[2][0], "bf16", "narrow"),
    _tile(TILES[2][0], "fp16", "narrow bias", bias=True),
    _tile(TILES[2][1], "bf16", "wide"),
    _tile(TILES[4][0], "fp32", "narrow"),
]
