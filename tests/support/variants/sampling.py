from __future__ import annotations

from aot import Variant

from tandem.kernels.triton.launch import warps
from tandem.kernels.triton.sampling import GROUPS_TILE, SHOW_BLOCK, _groups_kernel, _pick_kernel, _show_kernel
from tandem.kernels.triton.sampling_edits import (
    BAN_BLOCK,
    BLOCK,
    HISTORY_BLOCK,
    HISTORY_PROGRAMS,
    _ban_kernel,
    _count_kernel,
    _edit_kernel,
    _zero_kernel,
)
from tandem.kernels.triton.sampling_restrict import GATHERED, PIVOTS, TILE, _restrict_kernel

TYPES = {
    **dict.fromkeys(("edited", "shown", "peaks", "masses", "limits"), "*fp32"),
    **dict.fromkeys(("columns", "lists", "history", "counts", "listed", "gathered", "mask"), "*i32"),
    **dict.fromkeys(("slots", "lengths", "tokens"), "*i64"),
    **dict.fromkeys(("stride", "edited_stride", "shown_stride", "counts_stride", "history_stride"), "i32"),
    **dict.fromkeys(("vocab_size", "groups"), "i32"),
}


def _variant(
    label: str,
    kernel: object,
    dtype: str,
    constants: dict[str, object],
    num_warps: int,
    *,
    vocab: int = 128256,
    **promised: object,
) -> Variant:
    """`constants` has the kernel's constants and, as None, the tensors that are absent."""
    absent = {name for name in constants if name in TYPES}
    types = TYPES | {"logits": f"*{dtype}"}
    names = [name for name in kernel.arg_names if name in types and name not in absent]
    undivided = {"groups", "history_stride"} | ({"vocab_size", "stride"} if vocab % 16 else set())
    return Variant(
        label,
        kernel,
        {name: types[name] for name in names},
        constants,
        [name for name in names if name not in undivided],
        num_warps=num_warps,
        **promised,
    )


WIDE = ("LDG.128",)
BOTH = ("LDG.128", "STG.128")
GROUPS = {"MASKED": 0, "TILE": GROUPS_TILE}
UNEDITED = {"edited": None, "MASKED": 0}
RESTRICT = {"MASKED": 0, "TILE": TILE, "PIVOTS": PIVOTS, "GATHERED": GATHERED}
# Two programs on a processor. What lies on the stack are barriers of diverging threads, not values.
LIMITS = {"max_registers": 128, "max_stack": 32}

VARIANTS = [
    _variant("groups bf16", _groups_kernel, "bf16", GROUPS | UNEDITED, 8, max_registers=64, sass=WIDE),
    _variant("groups fp32", _groups_kernel, "fp32", GROUPS | UNEDITED, 8, max_registers=64, sass=WIDE),
    _variant("groups bf16 edited", _groups_kernel, "bf16", GROUPS, 8, max_registers=64, sass=WIDE),
    _variant("groups bf16 V=50257", _groups_kernel, "bf16", GROUPS | UNEDITED, 8, vocab=50257, max_registers=80),
    _variant("pick bf16", _pick_kernel, "bf16", UNEDITED | {"limits": None, "GROUPS": 1024}, warps(1024, 4)),
    _variant("pick fp32 edited V=256k", _pick_kernel, "fp32", {"MASKED": 0, "GROUPS": 2048}, warps(2048, 4)),
    _variant(
        "restrict bf16",
        _restrict_kernel,
        "bf16",
        UNEDITED | RESTRICT | {"limits": None, "GROUPS": 1024},
        8,
        sass=("LDG.64",),
        **LIMITS,
    ),
    _variant("restrict fp32 edited V=256k", _restrict_kernel, "fp32", RESTRICT | {"GROUPS": 2048}, 8, **LIMITS),
    _variant("show bf16", _show_kernel, "bf16", {"MASKED": 0, "BLOCK": SHOW_BLOCK}, 4, sass=BOTH),
    _variant("zero", _zero_kernel, "", {"BLOCK": BLOCK}, 4, sass=("STG.128",)),
    _variant("count", _count_kernel, "", {"BLOCK": HISTORY_BLOCK, "PROGRAMS": HISTORY_PROGRAMS}, 4),
    _variant("edit bf16", _edit_kernel, "bf16", {"mask": None, "BLOCK": BLOCK}, 8, max_registers=64, sass=BOTH),
    _variant("edit fp32 mask", _edit_kernel, "fp32", {"BLOCK": BLOCK}, 8, max_registers=64, sass=BOTH),
    _variant("ban", _ban_kernel, "", {"BLOCK": BAN_BLOCK}, 4),
]
