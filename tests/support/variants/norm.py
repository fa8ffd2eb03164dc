from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.launch import warps
from tandem.kernels.triton.norm import _layer_norm_kernel, _rms_norm_kernel


def _variant(
    label: str,
    kernel: object,
    dtype: str,
    width: int,
    absent: list[str],
    weight: str | None = None,
    int8: bool = False,
) -> Variant:
    block = 1 << (width - 1).bit_length()
    pointers = [
        name for name in ("x", "residual", "weight", "bias", "out") if name in kernel.arg_names and name not in absent
    ]
    return Variant(
        label,
        kernel,
        {name: f"*{weight if weight and name == 'weight' else dtype}" for name in pointers}
        | ({"out": "*i8", "scales": "*fp32"} if int8 else {})
        | {"x_stride": "i32", "residual_stride": "i32", "width": "i32", "eps": "fp32"},
        {"BLOCK": block} | dict.fromkeys(absent if int8 else [*absent, "scales"]),
        [*pointers, "x_stride", "residual_stride", "width"],
        num_warps=warps(block),
        max_registers=64,  # two programs of 16 warps on a processor
        sass=("LDG.128", "STG.128"),
    )


VARIANTS = [
    _variant("rms bf16 4096 residual", _rms_norm_kernel, "bf16", 4096, []),
    _variant("rms fp16 4096", _rms_norm_kernel, "fp16", 4096, ["residual"]),
    _variant("rms bf16 8192 residual", _rms_norm_kernel, "bf16", 8192, []),
    _variant("rms bf16 2560 residual", _rms_norm_kernel, "bf16", 2560, []),
    _variant("rms bf16 2304 residual, weight fp32", _rms_norm_kernel, "bf16", 2304, [], weight="fp32"),
    _variant("layer fp16 768 residual", _layer_norm_kernel, "fp16", 768, []),
    _variant("rms bf16 4096 residual to i8", _rms_norm_kernel, "bf16", 4096, [], int8=True),
    _variant("layer fp16 4096 to i8", _layer_norm_kernel, "fp16", 4096, ["residual"], int8=True),
    _variant("layer bf16 4096", _layer_norm_kernel, "bf16", 4096, ["residual"]),
]
