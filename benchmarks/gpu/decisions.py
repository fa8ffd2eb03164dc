"""Sizes that the kernels leave to measurement: each candidate timed, the best named beside what is in the code.

No goal needs it: it runs in the time that is left, or with all of it as `--sections decisions`. What it finds goes into
the kernels' tables by hand, with the figures in the commit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...kernels import dispatch, ops
from ...server.engine.device_sampler import DeviceSampler
from ...server.engine.request import Sampling
from . import attention
from .clock import device_time, release
from .kernels import MODEL, VOCABULARY
from .rows import Absent, Report
from .setting import Setting

BFLOAT16 = torch.bfloat16
Made = tuple[Callable[[], Tensor], float]  # a call, and the seconds that the hardware would take
WORTH = 1.02  # times as fast, from which on a change is proposed
LEAST = 4.0  # seconds that another candidate may need: it is compiled first

AS_IT_IS = "as it is"  # the candidate that changes nothing
# Fields of the modules' own Tile: (positions, warps, stages, registers, resident), (rows, positions, warps, stages,
# registers); of linear's Strip: (outs, columns, warps).
DECODE_TILES = (
    (64, 4, 3, 168, 3),
    (64, 4, 4, 168, 3),
    (64, 4, 5, None, 2),
    (64, 8, 5, None, 2),
    (32, 4, 5, 128, 4),
    (32, 4, 6, None, 4),
    (128, 8, 4, None, 1),
)
INT8_TILES = ((64, 4, 3, None, 2), (64, 4, 5, 168, 3), (32, 4, 5, None, 4), (64, 8, 5, None, 2), (128, 8, 3, None, 1))
PREFILL_TILES = (
    (128, 64, 8, 2, None),
    (128, 64, 8, 3, None),
    (128, 128, 8, 2, None),
    (128, 32, 8, 3, 128),
    (64, 64, 4, 3, None),
    (64, 64, 4, 2, 128),
)
# Of linear_int8's Strip, and of its tiles: (rows, outs, columns, warps, stages).
INT8_STRIPS = ((4, 1024, 2), (8, 1024, 4), (8, 512, 1), (4, 2048, 4), (16, 512, 2))
PRODUCT_TILES = {
    16: ((16, 64, 128, 4, 5), (16, 128, 128, 4, 4), (16, 128, 256, 4, 3), (16, 32, 256, 4, 5)),
    64: ((64, 64, 128, 4, 4), (64, 128, 64, 8, 4), (64, 128, 128, 8, 3), (64, 256, 64, 8, 4)),
    256: ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3)),
}
W8A8_TILES = ((128, 128, 128, 8, 4), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4))
STRIPS = ((8, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 2048, 8), (2, 2048, 4), (1, 4096, 8))


def run(setting: Setting, report: Report) -> None:
    with report.case("decisions"):
        if not setting.cuda or not dispatch.BACKENDS.get("cuda"):
            raise Absent("there are no kernels for this device")
        names = ("attention_decode", "attention_prefill", "linear", "logprobs", "sampling")
        modules: list[Any] = [import_module(f".triton.{name}", ops.__package__) for name in names]
        attention_decode, attention_prefill, linear, logprobs, sampling = modules
        for rows in (64, 1):
            context = 1024 if rows > 1 else 8192
            chunks = {f"{chunk}": {everywhere("CHUNK"): chunk} for chunk in (128, 256, 512, 1024)}
            sweep(
                setting, report, f"CHUNK, decode {rows} × {context}", chunks, decode(setting, rows, context, BFLOAT16)
            )
        for pages, tiles in ((BFLOAT16, DECODE_TILES), (torch.int8, INT8_TILES)):
            kind = "int8 KV" if pages == torch.int8 else "bf16"
            candidates = {str(t): {(attention_decode, "tile"): constant(attention_decode.Tile, t)} for t in tiles}
            sweep(setting, report, f"tile of decode, {kind}, 256 × 1024", candidates, decode(setting, 256, 1024, pages))
        candidates = {str(t): {(attention_prefill, "tile"): constant(attention_prefill.Tile, t)} for t in PREFILL_TILES}
        sweep(setting, report, "tile of prefill, 8 × 2048", candidates, prefill(setting, 8, 2048))
        for outs, ins in ((6144, 4096), (28672, 4096), (4096, 14336)):
            strips = {str(one): {(linear, "STRIPS"): {**linear.STRIPS, 1: linear.Strip(*one)}} for one in STRIPS}
            sweep(setting, report, f"STRIPS of 1 × {ins} → {outs}", strips, product(setting, 1, outs, ins))
        for rows in (8, 16):
            strips = {**linear.STRIPS, 8: linear.Strip(2, 512, 4), 16: linear.Strip(1, 512, 4)}
            most = {str(rows): {(linear, "MOST_ROWS"): {80: (rows, rows)}, (linear, "STRIPS"): strips}}
            sweep(setting, report, f"MOST_ROWS at {rows} × 4096 → 28672", most, product(setting, rows, 28672, 4096))
        int8(setting, report, import_module(".triton.linear_int8", ops.__package__))
        tiles = {str(count): {(sampling, "GROUPS_TILE"): count} for count in (8, 16, 32, 64, 128)}
        sweep(setting, report, "GROUPS_TILE of sampling, 256 × 128256", tiles, draw(setting, {"temperature": 1.0}))
        blocks = {str(size): {(logprobs, "BLOCK"): size} for size in (2048, 4096, 8192)}
        sweep(setting, report, "BLOCK of logprobs_of", blocks, scored(setting))


def int8(setting: Setting, report: Report, module: Any) -> None:
    """Of products with int8 weights."""
    for outs, ins in ((4096, 4096), (28672, 4096), (4096, 14336)):
        strips = {str(one): {(module, "STRIPS"): {**module.STRIPS, 1: module.Strip(*one)}} for one in INT8_STRIPS}
        sweep(setting, report, f"STRIPS of int8, 1 × {ins} → {outs}", strips, product_int8(setting, 1, outs, ins))
        for rows, tiles in PRODUCT_TILES.items():
            candidates = {str(one): {(module, "_sizes"): constant_tile(module, one)} for one in tiles}
            candidates |= {f"LEAST {least}": {(module, "LEAST"): least} for least in (512, 2048, 1 << 30)}
            title = f"tile of int8, {rows} × {ins} → {outs}"
            sweep(setting, report, title, candidates, product_int8(setting, rows, outs, ins))
    for rows in (1, 2, 4):
        most = {f"MOST_ROWS {most}": {(module, "MOST_ROWS"): most} for most in (0, 4)}
        title = f"MOST_ROWS of int8 at {rows} × 4096 → 28672"
        sweep(setting, report, title, most, product_int8(setting, rows, 28672, 4096))
    for rows in (256, 512, 1024):
        many = {f"MANY {many}": {(module, "MANY"): many} for many in (256, 2048)}
        sweep(setting, report, f"MANY of int8 at {rows} × 4096 → 14336", many, product_int8(setting, rows, 14336, 4096))
    candidates = {str(one): {(module, "_sizes"): constant_tile(module, one)} for one in W8A8_TILES}
    sweep(setting, report, "tile of w8a8, 2048 × 4096 → 14336", candidates, product_int8(setting, 2048, 14336, 4096, 8))


Change = Mapping[Any, Any]  # (module, name) -> value


def everywhere(name: str) -> tuple[tuple[Any, str], ...]:
    """A constant in all modules of `kernels` that know it."""
    modules = [m for path, m in sys.modules.items() if path.startswith("tandem.kernels") and hasattr(m, name)]
    return tuple((module, name) for module in modules)


def sweep(
    setting: Setting, report: Report, title: str, candidates: Mapping[str, Change], make: Callable[[], Made]
) -> None:
    """Times what the code has and every candidate, which must give the same result."""
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    expected: Tensor | None = None
    floor = 0.0
    for label, change in {AS_IT_IS: {}, **candidates}.items():
        if setting.left() < LEAST:
            failed[label] = "no time was left"
            continue
        try:
            with ExitStack() as stack:
                for place, value in change.items():
                    for module, name in place if isinstance(place[0], tuple) else (place,):
                        stack.enter_context(patch.object(module, name, value))
                torch.manual_seed(0)
                call, floor = make()
                found = call()
                expected = found.clone() if expected is None else expected
                attention.same(found, expected)
                times[label] = device_time(call, setting.device, tiny=setting.tiny).median
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        release(setting.device)
    if AS_IT_IS not in times:
        report.absent(title, f"what the code has could not be timed: {failed[AS_IT_IS]}")
        return
    best = min(times, key=times.__getitem__)
    taken, share, gain = times[best], floor / times[best], times[AS_IT_IS] / times[best]
    reason = "keep what is there" if gain < WORTH else f"{best}: {gain:.2f} × as fast as what is there"
    every: dict[str, Any] = {"microseconds": {label: 1e6 * time for label, time in times.items()}, "failed": failed}
    report.add(title, taken, "µs", scale=1e6, limit=1e6 * floor, share=share, reason=reason, best=best, **every)


def constant(kind: Any, sizes: tuple[int | None, ...]) -> Callable[..., Any]:
    """In place of a module's choice of sizes: these, whatever it is asked for."""
    chosen = kind(*sizes)
    return lambda *asked, **named: chosen


def decode(setting: Setting, rows: int, context: int, pages: torch.dtype) -> Callable[[], Made]:
    def make() -> Made:
        heads = setting.pick(attention.GQA, attention.SMALL)
        q, layer, sequences = attention.decode_inputs(setting, heads, rows, context, pages)
        floor = attention.decode_bytes(heads, rows, context, layer) / setting.limits.read
        return lambda: ops.paged_attention(q, layer, sequences, heads.size**-0.5), floor

    return make


def prefill(setting: Setting, rows: int, length: int) -> Callable[[], Made]:
    def make() -> Made:
        heads = setting.pick(attention.GQA, attention.SMALL)
        q, layer, sequences, flops = attention.prefill_inputs(setting, heads, rows, length)
        floor = flops / setting.limits.peak(q.dtype)
        return lambda: ops.paged_attention(q, layer, sequences, heads.size**-0.5), floor

    return make


def product(setting: Setting, rows: int, outs: int, ins: int) -> Callable[[], Made]:
    def make() -> Made:
        dtype = setting.dtype(BFLOAT16)
        x = torch.randn(rows, ins, device=setting.device).to(dtype)
        weight = (torch.randn(outs, ins, device=setting.device) * ins**-0.5).to(dtype)
        return lambda: ops.linear(x, weight), weight.nbytes / setting.limits.read

    return make


def constant_tile(module: Any, sizes: tuple[int, ...]) -> Callable[..., Any]:
    """In place of the module's choice of a tile: this one, and the parts that it gives a matrix."""
    return lambda x, weight, rows: (tile := module.Tile(*sizes), module.parts_of(weight, tile, rows))


def product_int8(setting: Setting, rows: int, outs: int, ins: int, bits: int = 16) -> Callable[[], Made]:
    """Of int8 weights with rows in 16 bits or 8."""

    def make() -> Made:
        dtype = setting.dtype(BFLOAT16)
        x = torch.randn(rows, ins, device=setting.device).to(dtype)
        weight = ops.quantize_rows(torch.randn(outs, ins, device=setting.device) * ins**-0.5)
        rate = setting.limits.peak(torch.int8 if bits == 8 else dtype)
        floor = max(weight.values.nbytes / setting.limits.read, 2 * rows * outs * ins / rate)
        if bits == 8:
            given = ops.quantize_rows(x)
            return lambda: ops.linear_w8a8(*given, weight, None, None, dtype), floor
        return lambda: ops.linear_int8(x, weight), floor

    return make


def draw(setting: Setting, given: Mapping[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        rows, size = setting.pick((256, VOCABULARY), (3, 500))
        logits = 4 * torch.randn(rows, size, device=setting.device)
        history = torch.zeros(rows, 64, dtype=torch.int32, device=setting.device)
        sampler = DeviceSampler(history, size, (), setting.device)
        for slot in range(rows):
            sampler.enter(slot, Sampling(max_tokens=8, seed=slot, **given), 0, 8)
        sampler.flush()
        slots = torch.arange(rows, device=setting.device)
        lengths = torch.full((rows,), 9, device=setting.device)
        uses = sampler.uses_of(list(range(rows)))
        return lambda: sampler.sample(logits, slots, lengths, uses, None).tokens, logits.nbytes / setting.limits.read

    return make


def scored(setting: Setting) -> Callable[[], Made]:
    def make() -> Made:
        tokens, size, vocabulary = setting.pick((1024, MODEL, VOCABULARY), (5, 64, 500))
        dtype = setting.dtype(BFLOAT16)
        hidden = torch.randn(tokens, size, device=setting.device).to(dtype)
        head = (torch.randn(vocabulary, size, device=setting.device) * size**-0.5).to(dtype)
        targets = torch.randint(0, vocabulary, (tokens,), device=setting.device)
        floor = 2 * tokens * size * vocabulary / setting.limits.peak(dtype)
        return lambda: ops.logprobs_of(hidden, head, targets).values, floor

    return make
