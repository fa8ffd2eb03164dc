from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from aot import ARCHS, Variant

from tandem.kernels.attention import CHUNK, FIELDS, MEMBERS
from tandem.kernels.triton import attention_decode as decode
from tandem.kernels.triton import attention_prefill as prefill
from tandem.kernels.triton.attention_tile import DTYPES

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}
STRIDES = ("row_stride", "head_stride", "page_stride", "kv_head_stride", "scale_page_stride", "scale_head_stride")
INTEGERS = ("capacity", "window", "decodes", "sequences", "table_stride", *STRIDES)


def _variant(
    kernel: object,
    label: str,
    dtype: torch.dtype,
    pages: torch.dtype,
    size: int,
    group: int,
    kv_heads: int,
    page: int,
    uses: tuple[str, ...],
    sizes: decode.Tile | prefill.Tile,
    constants: dict[str, object],
    **promises: object,
) -> Variant:
    absent = {"alibi", "window", "softcap"} - set(uses)
    if pages != torch.int8:
        absent |= {"k_scale", "v_scale"}
    q, kv = "*" + NAMES[dtype], "*" + NAMES[pages]
    given = {"q": q, "out": q, "k": kv, "v": kv, "k_scale": "*fp16", "v_scale": "*fp16", "alibi": "*fp32"}
    given |= {"sums": "*fp32", "extremes": "*fp32", "scale": "fp32", "softcap": "fp32"}
    given |= dict.fromkeys(("table", "ends", "work", "query_starts", "lengths"), "*i32") | dict.fromkeys(
        INTEGERS, "i32"
    )
    signature = {name: kind for name, kind in given.items() if name in kernel.arg_names and name not in absent}
    if pages != torch.int8:
        absent |= {"scale_page_stride", "scale_head_stride"}
        signature = {name: kind for name, kind in signature.items() if name not in absent}
    constants = dict.fromkeys(absent & set(kernel.arg_names)) | constants
    constants |= {name: 0 for name in ("scale_page_stride", "scale_head_stride") if name in absent}
    constants |= {"KV_HEADS": kv_heads, "GROUP": group, "HEADS": triton.next_power_of_2(group), "SIZE": size}
    constants |= {"PADDED": triton.next_power_of_2(size), "TILE": sizes.positions, "PAGE": page, "SLOT": size}
    constants |= {"SCALE_SLOT": 1, "DTYPE": DTYPES[torch.float32 if pages == torch.float32 else dtype]}
    return Variant(
        " ".join((label, NAMES[dtype], *(["int8"] if pages == torch.int8 else []), f"{size} G={group}", *uses)),
        kernel,
        signature,
        constants,
        [name for name, kind in signature.items() if kind[0] == "*" or name in STRIDES],
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        **promises,
    )


def _decode(
    dtype: torch.dtype,
    pages: torch.dtype,
    size: int,
    group: int,
    *uses: str,
    label: str = "decode",
    page: int = 64,
    shared: bool = False,
    walk: bool = False,
    archs: Sequence[int] = (90,),
) -> list[Variant]:
    heads = triton.next_power_of_2(group)
    rows = decode.rows_of_a_tile(heads, shared)
    lean = "window" not in uses and not walk
    found: list[Variant] = []
    for arch in archs:
        sizes = decode.tile(arch, dtype, pages, triton.next_power_of_2(size), page, rows, lean)
        constants = {"ROWS": rows, "PARTS": MEMBERS * heads // rows if shared else 1, "CHUNK": CHUNK, "FIELDS": FIELDS}
        constants |= {"SHARED": int(shared), "WALK": walk}
        promises = {"archs": [arch], "options": {"enable_fp_fusion": False, "maxnreg": sizes.registers}}
        if dtype == torch.float32:
            promises["max_stack"] = 16  # two registers, outside of the loop; float32 is not what is fast here
        else:
            # A processor has 65536 registers, and hands them to a warp in multiples of 8 per thread.
            promises["max_registers"] = min(255, 65536 // (sizes.resident * 32 * sizes.warps) // 8 * 8)
            promises["sass"] = ("LDGSTS.128", "STG.128")
            if not uses and (arch >= 90 or dtype == torch.float16):
                promises["absent"] = ("I2F",)
            if rows >= 64:
                promises["sass_on"] = {90: ("HGMMA",)}
        found.append(
            _variant(
                decode._chunks_kernel, label, dtype, pages, size, group, 8, page, uses, sizes, constants, **promises
            )
        )
    return found


def _prefill(
    dtype: torch.dtype,
    pages: torch.dtype,
    size: int,
    group: int,
    *uses: str,
    page: int = 64,
    archs: Sequence[int] = (90,),
) -> list[Variant]:
    found: list[Variant] = []
    for arch in archs:
        sizes = prefill.tile(arch, dtype, pages, triton.next_power_of_2(size), not uses)
        constants = {"ROWS": sizes.rows, "LANES": prefill.LANES}
        kept: dict[str, object] = {"archs": [arch], "options": {"maxnreg": sizes.registers}}
        if dtype != torch.float32:
            kept |= {"sass": ("LDGSTS.128",), "sass_on": {90: ("HGMMA",)}}
            if sizes.registers is not None:
                kept |= {"max_stack": 24}  # see `prefill.tile`
        found.append(
            _variant(
                prefill._tiles_kernel, "prefill", dtype, pages, size, group, 8, page, uses, sizes, constants, **kept
            )
        )
    return found


def _merge(dtype: torch.dtype, size: int) -> Variant:
    pointers = {"sums": "*fp32", "extremes": "*fp32", "out": "*" + NAMES[dtype], "ends": "*i32", "work": "*i32"}
    return Variant(
        f"merge {NAMES[dtype]} {size}",
        decode._merge_kernel,
        pointers | {"capacity": "i32"},
        {"window": None, "SIZE": size, "PADDED": size, "CHUNK": CHUNK, "UNROLLED": decode.UNROLLED},
        list(pointers),
        num_warps=1,
        options={"enable_fp_fusion": False},
        max_registers=255,
    )


BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
VARIANTS = [
    *_decode(BF16, BF16, 128, 4, archs=ARCHS),
    *_decode(FP16, FP16, 128, 1),
    *_decode(BF16, BF16, 64, 1),
    *_decode(FP16, FP16, 64, 8, archs=ARCHS),
    *_decode(BF16, INT8, 128, 4, archs=ARCHS),
    *_decode(FP16, INT8, 128, 1),
    *_decode(FP16, INT8, 64, 1),
    *_decode(FP16, INT8, 64, 8),
    *_decode(BF16, BF16, 128, 1, "alibi"),
    *_decode(BF16, INT8, 128, 1, "alibi"),
    *_decode(BF16, INT8, 128, 4, "window"),
    *_decode(BF16, INT8, 256, 2, "window", "softcap"),
    *_decode(BF16, BF16, 128, 4, "window", archs=ARCHS),
    *_decode(BF16, BF16, 256, 2, "window", "softcap"),
    *_decode(BF16, BF16, 128, 4, label="decode, pages of 16,", page=16),
    *_decode(BF16, INT8, 128, 4, label="decode, pages of 16,", page=16),
    *_decode(FP32, FP32, 128, 4, archs=ARCHS),
    *_decode(BF16, BF16, 128, 4, label="deterministic", walk=True),
    *_decode(BF16, INT8, 128, 4, label="deterministic", walk=True, archs=ARCHS),
    *_decode(BF16, BF16, 128, 4, label="shared", shared=True, archs=ARCHS),
    *_decode(BF16, BF16, 128, 1, label="shared", shared=True),
    *_decode(BF16, INT8, 128, 4, label="shared", shared=True, archs=ARCHS),
    *_decode(FP16, INT8, 128, 1, label="shared", shared=True),
    *_prefill(BF16, BF16, 128, 4, archs=ARCHS),
    *_prefill(FP16, FP16, 128, 1),
    *_prefill(BF16, BF16, 64, 1, archs=ARCHS),
    *_prefill(BF16, INT8, 128, 4, archs=ARCHS),
    *_prefill(FP16, INT8, 64, 1),
    *_prefill(BF16, INT8, 128, 1, "alibi"),
    *_prefill(BF16, INT8, 128, 4, "window"),
    *_prefill(BF16, INT8, 256, 2, "window", "softcap"),
    *_prefill(BF16, BF16, 128, 1, "alibi"),
    *_prefill(BF16, BF16, 128, 4, "window"),
    *_prefill(BF16, BF16, 256, 2, "window", "softcap", archs=ARCHS),
    *_prefill(FP32, FP32, 128, 4),
    _merge(BF16, 128),
]
