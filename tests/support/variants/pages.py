from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.pages import BYTES, _copy_pages_kernel


def _copy(dtype: str, size: int) -> Variant:
    names = {"src": "*i64", "dst": "*i64", "src_stride": "i32", "dst_stride": "i32", "stride": "i32", "count": "i32"}
    return Variant(
        f"copy_pages {dtype}",
        _copy_pages_kernel,
        {"pages": f"*{dtype}"} | names,
        {"BLOCK": BYTES // size},
        ["pages", "stride", "count"],
        max_registers=64,
        sass=("LDG.128", "STG.128"),
    )


VARIANTS = [_copy("bf16", 2), _copy("i8", 1), _copy("fp32", 4)]
