"""Rows and matrices in int8: each product beside its limit, beside the model's own in 16 bits and beside torch's.

Letters: T rows, D = ins, O = outs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ops
from ...kernels.ops import Int8
from . import attention
from .clock import device_time, release
from .rows import Absent, Report
from .setting import Setting

BFLOAT16 = torch.bfloat16
SHAPES = ((4096, 4096), (14336, 4096))  # outs, ins
ROWS = (1, 2, 8, 16, 64, 256, 2048)
INT_MM_ROWS = 17  # torch's product of int8 with int8 takes no fewer


def run(setting: Setting, report: Report) -> None:
    for outs, ins in setting.pick(SHAPES, ((96, 64),)):
        wide = (torch.randn(outs, ins, device=setting.device) * ins**-0.5).to(setting.dtype(BFLOAT16))
        weight = ops.quantize_rows(wide)
        for rows in setting.pick(ROWS, (1, 20)):
            products(setting, report, rows, wide, weight)
        release(setting.device)


def products(setting: Setting, report: Report, rows: int, wide: Tensor, weight: Int8) -> None:
    """With one matrix in 16 bits, in int8, and int8 rows by it."""
    (outs, ins), device = wide.shape, setting.device
    x = torch.randn(rows, ins, device=device).to(wide.dtype)
    given = ops.quantize_rows(x)
    name = f"{rows} × {ins} → {outs}"

    def time(call: Callable[[], Tensor], exact: Tensor) -> float:
        attention.same(call(), exact)
        return device_time(call, device, tiny=setting.tiny).median

    meant = (weight.values.float() * weight.scale.unsqueeze(-1)).to(wide.dtype)
    expected = F.linear(x, meant)
    own: dict[str, float] = {}
    with report.case(f"linear, {name}"):
        own["bf16"] = device_time(lambda: ops.linear(x, wide), device, tiny=setting.tiny).median
    calls: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
        "int8": (lambda: ops.linear_int8(x, weight), wide.dtype),
        "w8a8": (lambda: ops.linear_w8a8(*given, weight, None, None, wide.dtype), torch.int8),
    }
    for label, (call, dtype) in calls.items():
        with report.case(f"linear_{label}, {name}"):
            attention.same(call(), expected)
            taken = device_time(call, device, tiny=setting.tiny)
            own[label] = taken.median
            floor = max(weight.values.nbytes / setting.limits.read, 2 * rows * outs * ins / setting.limits.peak(dtype))
            detail: dict[str, Any] = {}
            if "bf16" in own:
                detail = {"linear_us": 1e6 * own["bf16"], "against_linear": own["bf16"] / taken.median}
            share = floor / taken.median
            report.add(f"linear_{label}, {name}", taken, "µs", scale=1e6, limit=1e6 * floor, share=share, **detail)
    peers: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "int8": ("torch._weight_int8pack_mm", lambda: packed_mm(setting, x, weight)),
        "w8a8": ("torch._int_mm", lambda: int_mm(setting, given, weight, wide.dtype)),
    }
    for label, (peer, call) in peers.items():
        with report.case(f"{peer}, {name}"):
            theirs = time(call, expected)
            report.add(f"{peer}, {name}", theirs, "µs", scale=1e6, against=theirs / own[label])


def packed_mm(setting: Setting, x: Tensor, weight: Int8) -> Tensor:
    """torch's product of 16 bits with int8. Raises Absent where the device has none."""
    try:
        return torch._weight_int8pack_mm(x, weight.values, weight.scale.to(x.dtype))
    except (NotImplementedError, RuntimeError) as error:
        raise Absent(f"{setting.device.type}: {str(error).splitlines()[0][:120]}") from error


def int_mm(setting: Setting, x: Int8, weight: Int8, dtype: torch.dtype) -> Tensor:
    """torch's product of int8 with int8 and the scales behind it, several launches. Raises Absent for few rows."""
    if setting.cuda and len(x.values) < INT_MM_ROWS:
        raise Absent(f"it takes {INT_MM_ROWS} rows or more")
    sums = torch._int_mm(x.values, weight.values.T)
    return (sums * x.scale.unsqueeze(-1) * weight.scale).to(dtype)
