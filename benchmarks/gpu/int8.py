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
        weight = ops.quantize_rows(torch.randn(outs, ins, device=setting.device) * ins**-0.5)
        for rows in setting.pick(ROWS, (1, 20)):
            products(setting, report, rows, weight)
        release(setting.device)


def products(setting: Setting, report: Report, rows: int, weight: Int8) -> None:
    """With one matrix in 16 bits, in int8, and int8 rows by it."""
    (outs, ins), dtype = weight.values.shape, setting.dtype(BFLOAT16)
    wide = (weight.values.float() * weight.scale.unsqueeze(-1)).to(dtype)
    x = torch.randn(rows, ins, device=setting.device).to(dtype)
    given = ops.quantize_rows(x)
    expected = F.linear(x, wide)

    def measure(label: str, call: Callable[[], Tensor], matrix: Tensor, kind: torch.dtype, plain: float = 0.0) -> float:
        """A row, with how many times as fast it is as what took `plain`; its seconds, 0 where there are none."""
        taken, name = 0.0, f"{label}, {rows} × {ins} → {outs}"
        with report.case(name):
            attention.same(call(), expected)
            timing = device_time(call, setting.device, tiny=setting.tiny)
            taken = timing.median
            floor = max(matrix.nbytes / setting.limits.read, 2 * rows * outs * ins / setting.limits.peak(kind))
            detail: dict[str, Any] = {"against_linear": plain / taken} if plain else {}
            report.add(name, timing, "µs", scale=1e6, limit=1e6 * floor, share=floor / taken, **detail)
        return taken

    values, int8 = weight.values, torch.int8
    plain = measure("linear", lambda: ops.linear(x, wide), wide, dtype)
    measure("linear_int8", lambda: ops.linear_int8(x, weight), values, dtype, plain)
    measure("linear_w8a8", lambda: ops.linear_w8a8(*given, weight, None, None, dtype), values, int8, plain)
    measure("torch._weight_int8pack_mm", lambda: packed_mm(setting, x, weight), values, dtype, plain)
    measure("torch._int_mm", lambda: int_mm(setting, given, weight, dtype), values, int8, plain)


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
