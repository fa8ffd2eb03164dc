"""What this machine can do at most: the denominators of all other sections, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clock import device_time, release
from .rows import Report
from .setting import Setting

TERA = 1e12


def run(setting: Setting, report: Report) -> None:
    bandwidths(setting, report)
    release(setting.device)
    products(setting, report)


def bandwidths(setting: Setting, report: Report) -> None:
    """`read` is the faster of torch's sum and a plain Triton loop over 8 GB; decoding only reads."""
    device, size = setting.device, setting.pick(8 << 30, 1 << 20)
    data = torch.randn(size // 4, device=device)
    readers: dict[str, Callable[[], Tensor]] = {"torch.sum": data.sum}
    if setting.cuda:
        with report.case("read with Triton"):
            from .read import reader  # needs Triton, which a machine without CUDA may lack

            readers["Triton"] = reader(data)
    times = {name: device_time(call, device, samples=20, tiny=setting.tiny) for name, call in readers.items()}
    name = min(times, key=lambda name: times[name].median)
    best = times[name]
    every = {reader: data.nbytes / time.median / TERA for reader, time in times.items()}
    report.add("read", data.nbytes / best.median / TERA, "TB/s", by=name, every=every, samples=best.samples)
    half = data[: len(data) // 2]
    into = data[len(data) // 2 :]
    taken = device_time(lambda: into.copy_(half), device, samples=20, tiny=setting.tiny)
    report.add("copy", 2 * half.nbytes / taken.median / TERA, "TB/s")


def products(setting: Setting, report: Report) -> None:
    """Matrix products of 8192³ on random data through torch, which calls cuBLAS."""
    size = setting.pick(8192, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        with report.case(name):
            if dtype == torch.int8:
                a, b = (torch.randint(-127, 128, (size, size), device=setting.device, dtype=dtype) for _ in range(2))
                b = b.t()  # the layout that cuBLAS takes: both operands along their common side

                def product(a: Tensor = a, b: Tensor = b) -> Tensor:
                    return torch._int_mm(a, b)
            else:
                a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))

                def product(a: Tensor = a, b: Tensor = b) -> Tensor:
                    return a @ b

            taken = device_time(product, setting.device, samples=20, tiny=setting.tiny)
            report.add(name, 2 * size**3 / taken.median / TERA, "TFLOP/s", best=2 * size**3 / taken.low / TERA)
