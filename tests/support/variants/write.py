from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.write import ELEMENTS, _write_kv_kernel

STRIDES = ("k_stride", "v_stride", "k_head_stride", "v_head_stride", "page_stride", "scale_stride")


def _write(dtype: str, stored: str, kv_heads: int, width: int) -> Variant:
    tensors = {"k": f"*{dtype}", "v": f"*{dtype}", "slots": "*i64", "k_pages": f"*{stored}", "v_pages": f"*{stored}"}
    scales = {"k_scales": "*fp16", "v_scales": "*fp16"}
    constants = {"KV_HEADS": kv_heads, "SIZE": 64, "WIDTH": width, "HEADS": ELEMENTS // width, "BLOCK": width}
    if stored == "i8":
        tensors |= scales
    else:
        constants |= dict.fromkeys(scales)
    return Variant(
        f"{dtype} to {stored} {kv_heads}×{width}",
        _write_kv_kernel,
        tensors | dict.fromkeys(STRIDES, "i32"),
        constants,
        [*(name for name in tensors if name != "slots"), *STRIDES],
        max_registers=96,
        sass=("LDG.128", "STG.64" if stored == "i8" else "STG.128"),
    )


VARIANTS = [_write("fp16", "fp16", 12, 64), _write("bf16", "i8", 32, 128), _write("fp16", "i8", 12, 64)]
