from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.int8 import _quantize_kernel
from tandem.kernels.triton.launch import warps


def _rows(dtype: str, width: int) -> Variant:
    block = 1 << (width - 1).bit_length()
    pointers = {"x": f"*{dtype}", "values": "*i8", "scales": "*fp32"}
    return Variant(
        f"{dtype} {width}",
        _quantize_kernel,
        pointers | {"stride": "i32", "width": "i32"},
        {"BLOCK": block},
        [*pointers, "stride", "width"],
        num_warps=warps(block),
        max_registers=64,  # two programs of 16 warps on a processor
        sass=("LDG.128", "STG.128"),
    )


VARIANTS = [_rows("bf16", 4096), _rows("fp16", 14336), _rows("bf16", 14336)]
