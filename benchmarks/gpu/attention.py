"""Attention over pages: decode beside the time to read K and V, prefill beside cuBLAS; SDPA and FA3 beside both.

Letters: B sequences, T tokens, N query heads, K kv heads, H head size, P pages, S page size, M page-table width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ops
from ...kernels.ops import KVLayer, Sequences
from .clock import device_time, release
from .rows import Absent, Report
from .setting import Setting

BFLOAT16 = torch.bfloat16
PAGE = 64


class Heads(NamedTuple):
    name: str
    queries: int
    keys: int
    size: int


GQA, MHA = Heads("32/8 × 128", 32, 8, 128), Heads("32/32 × 128", 32, 32, 128)
SMALL = Heads("4/2 × 32", 4, 2, 32)

Attend = Callable[[], object]


def run(setting: Setting, report: Report) -> None:
    peer = flash_3(setting, report)
    few, many = setting.pick(((64, 1024), (256, 1024)), ((2, 20), (3, 20)))
    for heads in setting.pick((GQA, MHA), (SMALL,)):
        for rows, context in (few, many):
            for pages in (BFLOAT16, torch.int8):
                decode(setting, report, heads, rows, context, pages, peer)
                release(setting.device)
    decode(setting, report, setting.pick(GQA, SMALL), 1, setting.pick(8192, 40), BFLOAT16, peer)
    for heads in setting.pick((GQA, MHA), (SMALL,)):
        cascade(setting, report, heads, *setting.pick((16, 16, 1024, 256), (2, 2, 16, 4)))
        release(setting.device)
    for rows, length in setting.pick(((8, 1024), (8, 2048)), ((2, 16),)):
        prefill(setting, report, setting.pick(GQA, SMALL), rows, length, peer)
        release(setting.device)


def cache_of(setting: Setting, heads: Heads, tokens: int, sequences: int, dtype: torch.dtype) -> tuple[KVLayer, Tensor]:
    """Pages full of noise, and a table [B, M] that gives every sequence pages from anywhere."""
    size = PAGE if setting.cuda else 16
    width = -(-tokens // size)
    shape = (sequences * width, heads.keys, size, heads.size)
    if dtype == torch.int8:
        k, v = (torch.randint(-127, 128, shape, dtype=dtype, device=setting.device) for _ in range(2))
        scales = [torch.full(shape[:3], 1 / 64, dtype=torch.float16, device=setting.device) for _ in range(2)]
        layer = KVLayer(k, v, *scales)
    else:
        layer = KVLayer(*(torch.randn(shape, device=setting.device).to(setting.dtype(dtype)) for _ in range(2)))
    table = torch.randperm(sequences * width, device=setting.device).int().view(sequences, width)
    return layer, table


def decode_inputs(
    setting: Setting, heads: Heads, rows: int, context: int, pages: torch.dtype
) -> tuple[Tensor, KVLayer, Sequences]:
    """One query per sequence; the list of work is made once per step, not per layer, and so not timed."""
    layer, table = cache_of(setting, heads, context, rows, pages)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=setting.device)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=setting.device)
    work = ops.attention_work(lengths, rows, max(2, rows * ops.decode_chunks(context)))
    q = torch.randn(rows, heads.queries, heads.size, device=setting.device).to(setting.dtype(BFLOAT16))
    return q, layer, Sequences(starts, lengths, table, rows, 1, context, work)


def decode_bytes(heads: Heads, rows: int, context: int, layer: KVLayer) -> float:
    """K and V of every sequence, q, and the result."""
    scales = 0 if layer.k_scale is None else layer.k_scale.element_size()
    per_token = 2 * heads.keys * (heads.size * layer.k.element_size() + scales)
    return rows * context * per_token + 2 * rows * heads.queries * heads.size * 2


def decode(
    setting: Setting, report: Report, heads: Heads, rows: int, context: int, pages: torch.dtype, peer: Any
) -> None:
    kind = "int8 KV" if pages == torch.int8 else "bf16"
    name = f"decode attention, {heads.name}, {kind}, {rows} × {context}"
    goal = "decode attention" if rows >= 64 or setting.tiny else None
    with report.case(name, goal):
        q, layer, sequences = decode_inputs(setting, heads, rows, context, pages)
        scale = heads.size**-0.5
        taken = device_time(lambda: ops.paged_attention(q, layer, sequences, scale), setting.device, tiny=setting.tiny)
        moved = decode_bytes(heads, rows, context, layer)
        floor = moved / setting.limits.read
        share = floor / taken.median
        report.add(name, taken, "µs", scale=1e6, limit=1e6 * floor, share=share, goal=goal, graph=taken.graph)
        if pages != torch.int8:
            against = f"{name}, against FA3"
            with report.case(against, "decode attention against FA3" if goal else None):
                call = peer(q, layer, sequences, scale)
                same(call(), ops.paged_attention(q, layer, sequences, scale))
                theirs = device_time(call, setting.device, tiny=setting.tiny)
                report.add(f"{name}, FA3", theirs, "µs", scale=1e6, limit=1e6 * floor, share=floor / theirs.median)
                judged = "decode attention against FA3" if goal else None
                report.add(against, theirs.median / taken.median, "×", goal=judged)


def cascade(
    setting: Setting, report: Report, heads: Heads, groups: int, members: int, prefix: int, suffix: int
) -> None:
    """Groups whose rows share the pages of a prefix: read once per group beside once per row."""
    name = f"decode attention, {heads.name}, bf16, {groups} groups of {members}, {prefix} shared + {suffix}"
    with report.case(name):
        rows = groups * members
        q, layer, alone = decode_inputs(setting, heads, rows, prefix + suffix, BFLOAT16)
        leaders = torch.arange(rows, device=setting.device) // members * members
        table, pages = alone.page_table.clone(), prefix // layer.k.shape[2]
        table[:, :pages] = table[leaders, :pages]
        alone = alone._replace(page_table=table)
        prefixes = torch.stack((leaders, torch.full_like(leaders, prefix))).int()
        capacity = max(2, rows * ops.decode_chunks(prefix + suffix))
        together = alone._replace(work=ops.attention_work(alone.lengths, rows, capacity, prefixes))
        scale = heads.size**-0.5
        same(ops.paged_attention(q, layer, together, scale), ops.paged_attention(q, layer, alone, scale))
        own, other = (
            device_time(lambda s=s: ops.paged_attention(q, layer, s, scale), setting.device, tiny=setting.tiny)
            for s in (together, alone)
        )
        tokens = groups * prefix + rows * suffix
        floor = decode_bytes(heads, 1, tokens, layer) / setting.limits.read
        report.add(name, own, "µs", scale=1e6, limit=1e6 * floor, share=floor / own.median)
        report.add(f"{name}, against unshared", other.median / own.median, "×")


def prefill_inputs(setting: Setting, heads: Heads, rows: int, length: int) -> tuple[Tensor, KVLayer, Sequences, float]:
    """`rows` prompts of that length, and the operations that they need."""
    layer, table = cache_of(setting, heads, length, rows, BFLOAT16)
    tokens = rows * length
    q = torch.randn(tokens, heads.queries, heads.size, device=setting.device).to(layer.k.dtype)
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=setting.device)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=setting.device)
    flops = 4 * heads.queries * heads.size * rows * length * (length + 1) / 2
    return q, layer, Sequences(starts, lengths, table, 0, length, length), flops


def prefill(setting: Setting, report: Report, heads: Heads, rows: int, length: int, peer: Any) -> None:
    """Prompts without a cached prefix, read back from their pages; SDPA gets the same K and V side by side."""
    name = f"prefill attention, {heads.name}, {rows} × {length}"
    with report.case(name):
        q, layer, sequences, flops = prefill_inputs(setting, heads, rows, length)
        table, scale = sequences.page_table, heads.size**-0.5
        floor = flops / setting.limits.peak(layer.k.dtype)

        def add(label: str, call: Attend) -> float:
            taken = device_time(call, setting.device, tiny=setting.tiny)
            rate = flops / taken.median / 1e12
            report.add(label, taken, "µs", scale=1e6, limit=1e6 * floor, share=floor / taken.median, tflops=rate)
            return taken.median

        own = add(name, lambda: ops.paged_attention(q, layer, sequences, scale))
        expected = ops.paged_attention(q, layer, sequences, scale)
        with report.case(f"{name}, SDPA"):
            flat = [gathered(pages, table, length) for pages in (layer.k, layer.v)]  # [B, K, n, H]
            queries = q.view(rows, length, heads.queries, heads.size).transpose(1, 2)

            def sdpa() -> Tensor:
                return F.scaled_dot_product_attention(queries, *flat, is_causal=True, scale=scale, enable_gqa=True)

            same(sdpa().transpose(1, 2).reshape(expected.shape), expected)
            theirs = add(f"{name}, SDPA", sdpa)
            report.add(f"{name}, against SDPA", theirs / own, "×")
        with report.case(f"{name}, FA3"):
            call = peer(q, layer, sequences, scale)
            same(call(), expected)
            report.add(f"{name}, against FA3", add(f"{name}, FA3", call) / own, "×")


def gathered(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """[P, K, S, H] by a table [B, M] -> [B, K, length, H]."""
    found = pages[table.long()].transpose(1, 2).flatten(2, 3)
    return found[:, :, :length].contiguous()


def same(theirs: object, own: Tensor) -> None:
    """A peer that computes something else is no peer."""
    assert isinstance(theirs, Tensor)
    far = (theirs.float() - own.float()).norm() / own.float().norm()
    assert far < 0.02, f"the two differ by {far:.3g} of the result's norm"


def flash_3(setting: Setting, report: Report) -> Any:
    """A maker of calls to FlashAttention-3; one that raises Absent where there is none."""
    found: Any = None
    with report.case("FlashAttention-3"):
        found = load_flash_3(setting)

    def make(q: Tensor, layer: KVLayer, sequences: Sequences, scale: float) -> Attend:
        if found is None:
            raise Absent("FlashAttention-3 was not found")
        given = {
            "q": q,
            "k": layer.k.transpose(1, 2),  # [P, S, K, H] by strides
            "v": layer.v.transpose(1, 2),
            "cu_seqlens_q": sequences.query_starts,
            "seqused_k": sequences.lengths,
            "max_seqlen_q": sequences.max_query,
            "max_seqlen_k": sequences.max_length,
            "page_table": sequences.page_table,
            "block_table": sequences.page_table,
            "softmax_scale": scale,
            "is_causal": True,
            "causal": True,
        }
        return lambda: found(given)

    return make


def load_flash_3(setting: Setting) -> Callable[[dict[str, Any]], Tensor]:
    """FA3's forward pass, by names of its arguments, from vLLM's library, an installed vLLM or FA3's own package."""
    if not setting.cuda:
        raise Absent("it runs on CUDA only")
    library = setting.fa3
    if library is None and (vllm := find_spec("vllm")) is not None and vllm.origin:
        library = next(Path(vllm.origin).parent.glob("vllm_flash_attn/_vllm_fa3_C*.so"), None)
    if library is not None:
        torch.ops.load_library(str(library))
        name = library.name.split(".")[0]
        return by_schema(getattr(torch.ops, name).fwd.default)
    if find_spec("flash_attn_3") is not None:
        importlib.import_module("flash_attn_3._C")
        return by_schema(torch.ops.flash_attn_3.fwd.default)
    raise Absent("neither --fa3 nor vllm nor flash_attn_3")


def by_schema(operator: Any) -> Callable[[dict[str, Any]], Tensor]:
    """Versions differ in their arguments: those that are given go by name, others get their default, or nothing."""
    nothing = {"bool": False, "int": 0, "float": 0.0}
    neutral = {"window_size_left": -1, "window_size_right": -1, "cp_world_size": 1}

    def call(given: dict[str, Any]) -> Tensor:
        filled: dict[str, Any] = {}
        for argument in operator._schema.arguments:
            if argument.name in given:
                filled[argument.name] = given[argument.name]
            elif not argument.has_default_value():
                filled[argument.name] = neutral.get(argument.name, nothing.get(str(argument.type)))
        return operator(**filled)[0]

    return call
