from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.rotary import ELEMENTS, _rotary_kernel

STRIDES = ("stride", "page_stride", "scale_stride")
WIDE = ("LDG.128", "STG.128")


def _rotary(
    label: str,
    dtype: str,
    stored: str,
    width: int,
    half: int,
    norms: bool = False,
    interleaved: bool = False,
    sass: tuple[str, ...] = (),
) -> Variant:
    tensors = {name: f"*{dtype}" for name in ("qkv", "out")} | {"positions": "*i64", "slots": "*i64"}
    tensors |= {"cos": "*fp32", "sin": "*fp32", "k_pages": f"*{stored}", "v_pages": f"*{stored}"}
    constants = {"QUERIES": 32, "KV_HEADS": 8, "SIZE": 64, "WIDTH": width, "HALF": half, "INTERLEAVED": interleaved}
    block_half, rest = 1 << (half - 1).bit_length(), width - 2 * half
    constants |= {
        "HEADS": ELEMENTS // width,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": rest and 1 << (rest - 1).bit_length(),
    }
    for present, names, kind in (
        (norms, ("q_norm", "k_norm"), dtype),
        (stored == "i8", ("k_scales", "v_scales"), "fp16"),
    ):
        if present:
            tensors |= dict.fromkeys(names, f"*{kind}")
        else:
            constants |= dict.fromkeys(names)
    return Variant(
        label,
        _rotary_kernel,
        tensors | {"eps": "fp32"} | dict.fromkeys(STRIDES, "i32"),
        constants,
        [*(name for name in tensors if name not in ("positions", "slots")), *STRIDES],
        num_warps=max(1, ELEMENTS // width * 2 * block_half // 512),
        max_registers=128,
        sass=sass,
    )


VARIANTS = [
    _rotary("bf16 32+8×128", "bf16", "bf16", 128, 64, sass=WIDE),
    _rotary("fp16 32+8×128", "fp16", "fp16", 128, 64, sass=WIDE),
    _rotary("bf16 to i8 32+8×128", "bf16", "i8", 128, 64, sass=WIDE),
    _rotary("fp16 to i8 32+8×64", "fp16", "i8", 64, 32, sass=WIDE),
    _rotary("bf16 norms 32+8×128", "bf16", "bf16", 128, 64, norms=True, sass=WIDE),
    _rotary("bf16 norms to i8 32+8×128", "bf16", "i8", 128, 64, norms=True, sass=WIDE),
    _rotary("fp16 32 of 128", "fp16", "fp16", 128, 16),
    _rotary("fp16 interleaved", "fp16", "fp16", 128, 64, interleaved=True),
]
