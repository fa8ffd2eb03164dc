from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.activation import BLOCK, _gelu_kernel, _silu_and_mul_kernel


def _silu(dtype: str) -> Variant:
    return Variant(
        f"silu_and_mul {dtype}",
        _silu_and_mul_kernel,
        {"x": f"*{dtype}", "out": f"*{dtype}", "stride": "i32", "inner": "i32"},
        {"BLOCK": BLOCK},
        ["x", "out", "stride", "inner"],
        max_registers=64,
        sass=("LDG.128", "STG.128"),
    )


def _gelu(dtype: str, tanh: bool) -> Variant:
    return Variant(
        f"{'gelu_tanh' if tanh else 'gelu'} {dtype}",
        _gelu_kernel,
        {"x": f"*{dtype}", "out": f"*{dtype}", "count": "i32"},
        {"TANH": tanh, "BLOCK": BLOCK},
        ["x", "out", "count"],
        max_registers=64,
        sass=("LDG.128", "STG.128"),
    )


VARIANTS = [_silu("bf16"), _silu("fp16"), _gelu("fp16", True), _gelu("bf16", True), _gelu("fp16", False)]
