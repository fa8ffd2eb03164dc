"""Every operation at the shapes of real models: its time beside what the bytes or operations it needs would take.

A row whose detail says `definition` ran the PyTorch body: no kernel is there for the device. Small calls live in L2 and
in launch latency; their share of the bandwidth is listed, not judged.

Letters: T tokens, R rows to draw for, D model size, I inner size of an MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import dispatch, ops
from ...model.linear import Linear
from ...model.slots import Place
from ...server.engine.device_sampler import DeviceSampler
from ...server.engine.request import Sampling
from . import attention, int8
from .clock import device_time, release
from .rows import Report
from .setting import Setting

BFLOAT16 = torch.bfloat16
MODEL, INNER, VOCABULARY = 4096, 14336, 128256  # of Llama-3-8B
MATRICES = {"qkv": (6144, 4096), "gate-up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)}  # outs, ins


def run(setting: Setting, report: Report) -> None:
    attention.run(setting, report)
    release(setting.device)
    sampling(setting, report)
    release(setting.device)
    products(setting, report)
    release(setting.device)
    int8.run(setting, report)
    release(setting.device)
    streams(setting, report)
    release(setting.device)
    with report.case("logprobs_of"):
        logprobs(setting, report)


def kind(setting: Setting, name: str) -> str:
    """What computes the operation on this device."""
    module = dispatch.BACKENDS.get(setting.device.type)
    found = module is not None and hasattr(import_module(module, ops.__package__), name)
    return "kernel" if found else "definition"


def timed(
    setting: Setting,
    report: Report,
    name: str,
    call: Callable[[], object],
    moved: float,
    goal: str | None = None,
    op: str = "",
) -> None:
    """A row of a call that moves so many bytes."""
    with report.case(name, goal):
        taken = device_time(call, setting.device, tiny=setting.tiny)
        floor = moved / setting.limits.read
        detail: dict[str, Any] = {"by": kind(setting, op)} if op else {}
        share = floor / taken.median
        report.add(
            name,
            taken,
            "µs",
            scale=1e6,
            limit=1e6 * floor,
            share=share,
            goal=goal,
            graph=taken.graph,
            bytes=moved,
            **detail,
        )


def streams(setting: Setting, report: Report) -> None:
    """Norms, activations, rotation and writes: they read and write, so their limit is the read bandwidth at best."""
    device, dtype = setting.device, setting.dtype(BFLOAT16)
    size, inner = setting.pick((MODEL, INNER), (64, 96))
    unit = dtype.itemsize
    for tokens in setting.pick((1, 256, 8192), (2,)):
        x, residual = (torch.randn(tokens, size, device=device).to(dtype) for _ in range(2))
        weight = torch.ones(size, device=device, dtype=dtype)

        def add_norm(x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight) -> Tensor:
            return ops.rms_norm(x, weight, 1e-5, residual)

        def norm(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return ops.layer_norm(x, weight, weight, 1e-5)

        def add_norm_int8(x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight) -> ops.Int8:
            return ops.rms_norm_int8(x, weight, 1e-5, residual)

        def quantize(x: Tensor = x) -> ops.Int8:
            return ops.quantize_rows(x)

        timed(setting, report, f"rms_norm + residual, {tokens} × {size}", add_norm, 4 * x.numel() * unit, op="rms_norm")
        moved = x.numel() * (3 * unit + 1)
        timed(setting, report, f"rms_norm_int8 + residual, {tokens} × {size}", add_norm_int8, moved, op="rms_norm_int8")
        moved = x.numel() * (unit + 1)
        timed(setting, report, f"quantize_rows, {tokens} × {size}", quantize, moved, op="quantize_rows")
        timed(setting, report, f"layer_norm, {tokens} × {size}", norm, 2 * x.numel() * unit, op="layer_norm")
        gate_up = torch.randn(tokens, 2 * inner, device=device).to(dtype)

        def gated(x: Tensor = gate_up) -> Tensor:
            return ops.silu_and_mul(x)

        def curved(x: Tensor = gate_up) -> Tensor:
            return ops.gelu_tanh(x)

        elements = gate_up.numel() * unit
        timed(setting, report, f"silu_and_mul, {tokens} × {inner}", gated, 1.5 * elements, op="silu_and_mul")
        timed(setting, report, f"gelu_tanh, {tokens} × {2 * inner}", curved, 2 * elements, op="gelu_tanh")
        writes(setting, report, tokens)
        release(device)
    heads = setting.pick(attention.GQA, attention.SMALL)
    with report.case("copy_pages"):
        layer, _ = attention.cache_of(setting, heads, 64 * 1024 if setting.cuda else 64, 1, BFLOAT16)
        count = len(layer.k) // 4
        order = torch.randperm(len(layer.k), device=device)
        src, dst = order[:count], order[count : 2 * count]
        moved = 2 * count * layer.k[0].nbytes
        timed(
            setting, report, f"copy_pages, {count}", lambda: ops.copy_pages(layer.k, src, dst), moved, op="copy_pages"
        )


def writes(setting: Setting, report: Report, tokens: int) -> None:
    """Rotation of q and k and the write of k and v, as LLaMA does it, and the write alone, as GPT-2 does it."""
    device, heads = setting.device, setting.pick(attention.GQA, attention.SMALL)
    dtype = setting.dtype(BFLOAT16)
    width = (heads.queries + 2 * heads.keys) * heads.size
    qkv = torch.randn(tokens, width, device=device).to(dtype)
    positions = torch.arange(tokens, device=device)
    cos, sin = (torch.rand(max(tokens, 64), heads.size // 2, device=device) for _ in range(2))
    for pages in (BFLOAT16, torch.int8):
        layer, _ = attention.cache_of(setting, heads, max(tokens, 64), 1, pages)
        slots = torch.randperm(layer.k.shape[0] * layer.k.shape[2], device=device)[:tokens]
        label = "int8" if pages == torch.int8 else "bf16"
        stored = 2 * heads.keys * (heads.size * layer.k.element_size() + (2 if pages == torch.int8 else 0))
        moved = tokens * ((width + heads.queries * heads.size) * dtype.itemsize + stored)
        k, v = qkv.view(tokens, -1, heads.size)[:, heads.queries :].split(heads.keys, 1)
        written = tokens * (2 * heads.keys * heads.size * dtype.itemsize + stored)

        def rotate(layer: ops.KVLayer = layer, slots: Tensor = slots) -> Tensor:
            return ops.qk_norm_rotary_and_write_kv(qkv, None, None, 1e-6, positions, cos, sin, False, slots, layer)

        def write(layer: ops.KVLayer = layer, slots: Tensor = slots, k: Tensor = k, v: Tensor = v) -> None:
            ops.write_kv(k, v, slots, layer)

        name = f"rotary + write, {heads.name}, {label}, {tokens}"
        timed(setting, report, name, rotate, moved, op="qk_norm_rotary_and_write_kv")
        timed(setting, report, f"write_kv, {heads.name}, {label}, {tokens}", write, written, op="write_kv")


def sampling(setting: Setting, report: Report) -> None:
    """Draws from logits as the head leaves them; torch's sort of the same logits beside it."""
    rows, size = setting.pick((256, VOCABULARY), (3, 500))
    device = setting.device
    kinds = {
        "greedy": ({"temperature": 0.0}, None),
        "plain": ({"temperature": 1.0}, "sampling plain"),
        "top-k + top-p": ({"temperature": 1.0, "top_k": 50, "top_p": 0.95}, "sampling top-k + top-p"),
        "top-p": ({"temperature": 1.0, "top_p": 0.95}, None),
        "min-p": ({"temperature": 1.0, "min_p": 0.05}, None),
        "penalties": ({"temperature": 1.0, "repetition_penalty": 1.1, "presence_penalty": 0.5}, None),
        "plain, logprobs": ({"temperature": 1.0, "logprobs": 0}, None),
    }
    for dtype in (torch.float32, setting.dtype(BFLOAT16)):
        logits = (4 * torch.randn(rows, size, device=device)).to(dtype)
        for name, (given, goal) in kinds.items():
            draws(
                setting, report, f"sample, {name}, {rows} × {size}, {dtype}".replace("torch.", ""), logits, given, goal
            )
        if not setting.cuda:
            break
    flat = torch.randn(rows, size, device=device)
    timed(setting, report, f"torch.sort, {rows} × {size}", lambda: flat.sort(-1, descending=True), flat.nbytes)
    one = torch.randn(1, size, device=device)
    draws(setting, report, f"sample, top-k + top-p, 1 × {size}, float32", one, kinds["top-k + top-p"][0], None)


def draws(
    setting: Setting, report: Report, name: str, logits: Tensor, given: dict[str, float], goal: str | None
) -> None:
    with report.case(name, goal):
        rows, past = len(logits), setting.pick(1024, 8)
        history = torch.randint(0, logits.shape[1], (rows, 2 * past), dtype=torch.int32, device=setting.device)
        sampler = DeviceSampler(history, logits.shape[1], (), setting.device)
        for slot in range(rows):
            sampler.enter(slot, Sampling(**{"max_tokens": past, "seed": slot} | given), 0, past)  # type: ignore[arg-type]
        sampler.flush()
        slots = torch.arange(rows, device=setting.device)
        lengths = torch.full((rows,), past + 5, device=setting.device)
        uses = sampler.uses_of(list(range(rows)))
        top = 0 if "logprobs" in given else None
        found = sampler.sample(logits, slots, lengths, uses, top).tokens
        assert ((found >= 0) & (found < logits.shape[1])).all(), "a row without a token"
        timed(
            setting,
            report,
            name,
            lambda: sampler.sample(logits, slots, lengths, uses, top),
            logits.nbytes,
            goal,
            "sample",
        )


def products(setting: Setting, report: Report) -> None:
    """Matrices of the model at few rows: the model's own way beside cuBLAS, which torch calls."""
    shapes = setting.pick(MATRICES, {"qkv": (96, 64)})
    place = Place(setting.dtype(BFLOAT16), setting.device)
    for name, (outs, ins) in shapes.items():
        linear = Linear(("w",), ins, (outs,), place, split="none")
        weight = linear.weight.normal_(0, ins**-0.5)
        for rows in setting.pick((1, 2, 4, 8, 16, 64, 256), (1, 2)):
            x = torch.randn(rows, ins, device=setting.device).to(place.dtype)
            compare(setting, report, f"linear {name}, {rows} × {ins} → {outs}", linear, x, weight)
        release(setting.device)


def compare(setting: Setting, report: Report, name: str, linear: Linear, x: Tensor, weight: Tensor) -> None:
    with report.case(name):
        attention.same(linear(x), F.linear(x, weight))
        own = device_time(lambda: linear(x), setting.device, tiny=setting.tiny)
        theirs = device_time(lambda: F.linear(x, weight), setting.device, tiny=setting.tiny)
        limits, rows = setting.limits, len(x)
        read = weight.numel() if linear.quantized else weight.nbytes
        floor = max(read / limits.read, 2 * rows * weight.numel() / limits.peak(x.dtype))
        detail: dict[str, Any] = {"cublas_us": 1e6 * theirs.median, "against_cublas": theirs.median / own.median}
        report.add(name, own, "µs", scale=1e6, limit=1e6 * floor, share=floor / own.median, **detail)


def logprobs(setting: Setting, report: Report) -> None:
    tokens, size, vocabulary = setting.pick((4096, MODEL, VOCABULARY), (5, 64, 500))
    dtype = setting.dtype(BFLOAT16)
    hidden = torch.randn(tokens, size, device=setting.device).to(dtype)
    head = (torch.randn(vocabulary, size, device=setting.device) * size**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=setting.device)
    taken = device_time(lambda: ops.logprobs_of(hidden, head, targets), setting.device, samples=10, tiny=setting.tiny)
    floor = 2 * tokens * size * vocabulary / setting.limits.peak(dtype)
    name = f"logprobs_of, {tokens} × {size} × {vocabulary}"
    by = kind(setting, "logprobs_of")
    report.add(name, taken, "µs", scale=1e6, limit=1e6 * floor, share=floor / taken.median, by=by)
