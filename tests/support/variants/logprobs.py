from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.launch import warps
from tandem.kernels.triton.logprobs import BLOCK, _join_kernel, _part_kernel

POINTERS = {"targets": "*i64", "peaks": "*fp32", "sums": "*fp32", "above": "*i32"}
RESULTS = {"values": "*fp32", "ranks": "*i64", "norms": "*fp32"}


def _factors(scaled: bool) -> tuple[dict[str, str], dict[str, None]]:
    return ({"factors": "*fp32"}, {}) if scaled else ({}, {"factors": None})


def _part(dtype: str, listed: bool, scaled: bool = False) -> Variant:
    given, absent = _factors(scaled)
    pointers = {"logits": f"*{dtype}"} | POINTERS | given
    return Variant(
        f"part {dtype}{' listed' if listed else ''}{' scaled' if scaled else ''}",
        _part_kernel,
        pointers | {"stride": "i32", "vocab_size": "i32", "parts": "i32"},
        absent | {"ALL": listed, "BLOCK": BLOCK},
        [*pointers, "stride", "vocab_size"],
        num_warps=warps(BLOCK, 32),
        max_registers=128,
        sass=("LDG.128",),
    )


def _join(dtype: str, parts: int, scaled: bool = False) -> Variant:
    given, absent = _factors(scaled)
    pointers = {"logits": f"*{dtype}"} | POINTERS | RESULTS | given
    return Variant(
        f"join {dtype} {parts}{' scaled' if scaled else ''}",
        _join_kernel,
        pointers | {"stride": "i32", "parts": "i32"},
        absent | {"ALL": False, "PARTS": parts},
        [*pointers, "stride"],
        num_warps=1,
        max_registers=64,
    )


VARIANTS = [
    *(_part("bf16", False), _part("fp32", True), _part("bf16", False, scaled=True)),
    *(_join("bf16", 32), _join("fp32", 64), _join("bf16", 32, scaled=True)),
]
