"""`tandem bench kernels`: the operations of `kernels/ops.py` at one model's shapes, each beside what it takes at least.

The least time of a call is that of reading (and writing) its bytes once or of its operations, by limits measured in the
same run. How calls are timed and inputs are made is the GPU suite's (`benchmarks/gpu`); on a CPU nothing flushes its
caches between two calls, so that small tensors may beat memory: their share says little.

Letters: R rows of a decode step, T tokens of a prompt, D model size, V vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...model.config import ModelConfig, read_config
from ...model.linear import Linear
from ...model.load import choose_dtype
from ...model.quantization import SCHEMES, Quantization, SchemeName
from ...model.slots import Place
from ..gpu import attention
from ..gpu import kernels as suite
from ..gpu.attention import Heads
from ..gpu.clock import device_time, release
from ..gpu.rows import Report, Row
from ..gpu.setting import Limits as SuiteLimits
from ..gpu.setting import Setting
from . import limits, offline, result
from .models import UsageError, is_null, path_of
from .sides import Setup

EPS = 1e-5
MATRICES = ("qkv", "out", "up", "down", "head")
KEPT: tuple[SchemeName, ...] = ("none", *SCHEMES)  # how each matrix is kept, one after the other


@dataclass(frozen=True)
class OfModel(Setting):
    """The suite's setting with the model's dtype everywhere and the limits of this run."""

    own: torch.dtype = torch.float32
    measured: limits.Limits = field(default_factory=lambda: limits.Limits(float("nan"), {}))

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        return self.own

    @property
    def limits(self) -> SuiteLimits:
        rate, unknown = self.measured.rates.get(self.own, float("nan")), float("nan")
        return SuiteLimits(self.measured.read, unknown, rate, rate, unknown)


@dataclass(frozen=True)
class Shapes:
    rows: tuple[int, ...] = (1, 16, 64)  # of decode steps
    tokens: tuple[int, ...] = (512,)  # of a prompt
    context: int = 512  # tokens that a decoding sequence has


def run(setup: Setup, shapes: Shapes) -> dict[str, Any]:
    """The result as JSON. Raises UsageError for a model without kernels and CheckpointError."""
    if is_null(setup.model):
        raise UsageError(f"--model {setup.model} has no operations; give a checkpoint's directory, demo or random:125m")
    config = read_config(path_of(setup.model))
    device = torch.device(setup.device)
    if setup.options.threads is not None:
        torch.set_num_threads(setup.options.threads)
    if setup.dtype in SCHEMES:
        raise UsageError(f"--dtype {setup.dtype}: give the model's own; matrices are measured in int8 beside it")
    dtype = choose_dtype(setup.dtype, config, device)  # type: ignore[arg-type]
    measured = limits.measure(device, [dtype])
    setting = OfModel(device, Path(), own=dtype, measured=measured)
    report = Report("kernels", None, device.type)
    with torch.inference_mode(), redirect_stdout(io.StringIO()):  # the suite says what it is at
        for rows in shapes.rows:
            of_rows(setting, report, config, rows, f"{rows} rows")
            decode_attention(setting, report, config, rows, shapes.context)
            draws(setting, report, config, rows)
            release(device)
        for tokens in shapes.tokens:
            of_rows(setting, report, config, tokens, f"prompt of {tokens}")
            prefill_attention(setting, report, config, tokens)
            logprobs(setting, report, config, tokens)
            release(device)
    return {
        "benchmark": "kernels",
        "model_id": setup.model,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "context": shapes.context,
        "operations": [entry(row, suite.kind(setting, "linear")) for row in report.rows],
        "limits": measured.as_json(),
    } | result.describe(setup.device)


def heads_of(config: ModelConfig) -> Heads:
    return Heads(
        f"{config.heads}/{config.kv_heads} × {config.head_size}", config.heads, config.kv_heads, config.head_size
    )


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outs and ins of a layer's matrices, and the head's."""
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    gated = 2 if config.gated else 1
    head = config.labels or config.vocab_size
    shapes = (
        (queries + 2 * keys, config.hidden_size),
        (config.hidden_size, queries),
        (gated * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
        (head, config.hidden_size),
    )
    return dict(zip(MATRICES, shapes, strict=True))


def of_rows(setting: OfModel, report: Report, config: ModelConfig, rows: int, label: str) -> None:
    """What a layer does besides attention, and the head."""
    for name, call, moved, op in streams(setting, config, rows):
        suite.timed(setting, report, f"{label}: {name}", call, moved, op=op)
    for name, (outs, ins) in matrices(config).items():
        x = torch.randn(rows, ins, device=setting.device).to(setting.own)
        drawn = torch.randn(outs, ins, device=setting.device) * ins**-0.5
        for scheme in KEPT:
            place = Place(setting.own, setting.device, quantization=Quantization(scheme))
            linear = Linear(("w",), ins, (outs,), place, split="none")
            next(linear.slots("w")).write(drawn)
            linear.finish()
            kept = "" if scheme == "none" else f"{scheme} "
            suite.compare(setting, report, f"{label}: {kept}linear {name}, {ins} → {outs}", linear, x, linear.weight)


def streams(setting: OfModel, config: ModelConfig, rows: int) -> Iterator[tuple[str, Callable[[], object], float, str]]:
    """Norm, activation and the write of K and V: name, call, bytes, operation."""
    device, dtype, size = setting.device, setting.own, config.hidden_size
    x, residual = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(size, device=device, dtype=dtype)
    gated = config.gated
    if config.rope is not None:
        yield "rms_norm + residual", lambda: ops.rms_norm(x, weight, EPS, residual), 4 * x.nbytes, "rms_norm"
    else:
        yield "layer_norm", lambda: ops.layer_norm(x, weight, weight, EPS), 2 * x.nbytes, "layer_norm"
    inner = torch.randn(rows, (2 if gated else 1) * config.intermediate_size, device=device).to(dtype)
    if gated:
        yield "silu_and_mul", lambda: ops.silu_and_mul(inner), 1.5 * inner.nbytes, "silu_and_mul"
    else:
        name = "gelu" if config.activation == "gelu" else "gelu_tanh"
        curve = ops.gelu if name == "gelu" else ops.gelu_tanh
        yield name, lambda: curve(inner), 2 * inner.nbytes, name
    heads = heads_of(config)
    layer, _ = attention.cache_of(setting, heads, max(rows, 64), 1, dtype)
    slots = torch.randperm(layer.k.shape[0] * layer.k.shape[2], device=device)[:rows]
    qkv = torch.randn(rows, (heads.queries + 2 * heads.keys) * heads.size, device=device).to(dtype)
    stored = 2 * rows * heads.keys * heads.size * dtype.itemsize
    if config.rope is not None:
        positions = torch.arange(rows, device=device)
        cos, sin = (torch.rand(max(rows, 64), heads.size // 2, device=device) for _ in range(2))

        def rotate() -> Tensor:
            return ops.qk_norm_rotary_and_write_kv(qkv, None, None, EPS, positions, cos, sin, False, slots, layer)

        queries = rows * heads.queries * heads.size * dtype.itemsize
        yield "rotary + write", rotate, qkv.nbytes + queries + stored, "qk_norm_rotary_and_write_kv"
    else:
        k, v = qkv.view(rows, -1, heads.size)[:, heads.queries :].split(heads.keys, 1)
        yield "write_kv", lambda: ops.write_kv(k, v, slots, layer), 2 * stored, "write_kv"


def decode_attention(setting: OfModel, report: Report, config: ModelConfig, rows: int, context: int) -> None:
    heads = heads_of(config)
    q, layer, sequences = attention.decode_inputs(setting, heads, rows, context, setting.own)
    moved = attention.decode_bytes(heads, rows, context, layer)
    scale = heads.size**-0.5

    def call() -> Tensor:
        return ops.paged_attention(q, layer, sequences, scale)

    suite.timed(
        setting, report, f"{rows} rows: paged_attention, {context} tokens each", call, moved, op="paged_attention"
    )


def prefill_attention(setting: OfModel, report: Report, config: ModelConfig, tokens: int) -> None:
    heads = heads_of(config)
    q, layer, sequences, flops = attention.prefill_inputs(setting, heads, 1, tokens)
    name, scale = f"prompt of {tokens}: paged_attention", heads.size**-0.5
    with report.case(name):
        taken = device_time(lambda: ops.paged_attention(q, layer, sequences, scale), setting.device)
        floor = flops / setting.limits.peak(setting.own)
        by = suite.kind(setting, "paged_attention")
        report.add(name, taken, "µs", scale=1e6, limit=1e6 * floor, share=floor / taken.median, by=by)


def draws(setting: OfModel, report: Report, config: ModelConfig, rows: int) -> None:
    """From logits as the head leaves them; a reward model draws nothing."""
    if config.labels:
        return
    logits = 4 * torch.randn(rows, config.vocab_size, device=setting.device)
    kinds: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "top-k + top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    }
    for name, given in kinds.items():
        suite.draws(setting, report, f"{rows} rows: sample, {name}, {config.vocab_size}", logits, given, None)


def logprobs(setting: OfModel, report: Report, config: ModelConfig, tokens: int) -> None:
    if config.labels:
        return
    size, vocabulary, dtype = config.hidden_size, config.vocab_size, setting.own
    hidden = torch.randn(tokens, size, device=setting.device).to(dtype)
    head = (torch.randn(vocabulary, size, device=setting.device) * size**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=setting.device)
    name = f"prompt of {tokens}: logprobs_of, {vocabulary}"
    with report.case(name):
        taken = device_time(lambda: ops.logprobs_of(hidden, head, targets), setting.device, samples=10)
        floor = 2 * tokens * size * vocabulary / setting.limits.peak(dtype)
        by = suite.kind(setting, "logprobs_of")
        report.add(name, taken, "µs", scale=1e6, limit=1e6 * floor, share=floor / taken.median, by=by)


def entry(row: Row, linear: str) -> dict[str, Any]:
    """Microseconds. `reason` where there is no figure; `linear`: what computes matrix products."""
    found: dict[str, Any] = {
        "operation": row.name,
        "median_us": row.figure,
        "low_us": row.low,
        "high_us": row.high,
        "samples": row.samples,
        "least_us": row.limit,
        "share": row.share,
        "by": row.detail.get("by", linear if "cublas_us" in row.detail else ""),
    }
    if "cublas_us" in row.detail:
        found["torch_linear_us"] = row.detail["cublas_us"]
    return found | ({"reason": row.reason} if row.reason else {})


def lines(found: dict[str, Any]) -> list[str]:
    head = ("operation", "by", "µs", "10..90 %", "least µs", "share", "F.linear µs")
    cells: list[tuple[str, ...]] = [head]
    for one in found["operations"]:
        if one["median_us"] is None:
            cells.append((one["operation"], one["by"], "-", "", "", "", one.get("reason", "")))
            continue
        number = offline.number
        peer = number(one["torch_linear_us"]) if "torch_linear_us" in one else ""
        between = f"{number(one['low_us'])}..{number(one['high_us'])}"
        least, share = number(one["least_us"]), f"{one['share']:.1%}"
        cells.append((one["operation"], one["by"], number(one["median_us"]), between, least, share, peer))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    shown = [f"Tandem: {found['model_id']}, {found['dtype']}, {found['threads']} threads"]
    for line in cells:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        shown.append("  ".join(padded).rstrip())
    shown.append(offline.row("limit of this machine", offline.limit_text(found["limits"])))
    return [*shown, offline.row("versions", offline.versions_text(found["versions"]))]
