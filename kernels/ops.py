"""The operations that models are written in.

Each function fixes a name, a signature and, by its body, a result. A backend is a module of this package that defines
some of these functions again, faster; it takes the calls whose first tensor is on its device type, and whatever it
does not define runs the body below.

Letters: T tokens of a step, B sequences, N query heads, K kv heads, G = N / K query heads that share a kv head, H head
size, R rotated part of a head, D model size, I inner size of an MLP, V vocabulary, P pages, S page size, M page-table
width.

Statistics, softmax and sums are float32 whatever the dtype of the tensors; results are rounded once, at the end.
"""

# torch leaves the types of some functions and methods partly open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Args = ParamSpec("Args")
Result = TypeVar("Result")

# Device type -> module of this package that may define the operations below again.
BACKENDS: Mapping[str, str] = MappingProxyType({})

# K (and as much V) that one round of decode attention gathers, in elements: 1 MiB in float32. From 4 MiB on every round
# runs on fresh, unmapped memory from the allocator; below 0.5 MiB the rounds' own cost shows.
GATHER_ELEMENTS = 1 << 18
# Elements of one attention mask with a plane per head (32 MiB in float32).
MASK_ELEMENTS = 1 << 23
# Float32 logits that `logprobs_of` holds at once, in elements (64 MiB).
LOGIT_ELEMENTS = 1 << 24


class Sequences(NamedTuple):
    """Which rows belong to which sequence, and where its K and V are. Row counts, not tokens, are what T counts.

    The first `decodes` sequences have exactly one row each. `lengths` counts the K/V of a sequence including this
    step's rows, which are its last ones. Entries of `page_table` past a sequence's last page may hold anything.
    """

    query_starts: Tensor  # [B + 1] int32
    lengths: Tensor  # [B] int32
    page_table: Tensor  # [B, M] int32
    decodes: int
    max_query: int
    max_length: int


class KVLayer(NamedTuple):
    """The pages of one layer. int8 values stand for value * scale, one scale per token and kv head."""

    k: Tensor  # [P, K, S, H]
    v: Tensor  # [P, K, S, H]
    k_scale: Tensor | None = None  # [P, K, S] float16
    v_scale: Tensor | None = None


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens; `top_*` has as many columns as were asked for, most likely first."""

    values: Tensor  # [T] float32
    ranks: Tensor  # [T] int64, 1 is the most likely
    top_values: Tensor  # [T, top] float32
    top_ids: Tensor  # [T, top] int64


def op(body: Callable[Args, Result]) -> Callable[Args, Result]:
    """Call the backend's function of the same name where there is one for the first tensor's device, else `body`."""
    overrides: dict[str, Callable[Args, Result]] = {}  # filled on first use, never changed after

    @wraps(body)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, Tensor)
        device = first.device.type
        if device not in overrides:
            module = BACKENDS.get(device)
            override = getattr(import_module(module, __package__), body.__name__, body) if module else body
            overrides[device] = override
        return overrides[device](*args, **kwargs)

    return call


# Normalisation ------------------------------------------------------------------------------------------------------


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps), rounded to x's dtype, times weight, over the last dimension. x [..., D], weight [D].

    With `residual` (x's shape and dtype) it is the sum that is normalised, and `residual` becomes that sum, in place.
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype).mul_(weight)


@op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension. x [T, D], weight and bias [D].

    With `residual` (x's shape and dtype) it is the sum that is normalised, and `residual` becomes that sum, in place.
    """
    if residual is not None:
        x = residual.add_(x)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# Activations --------------------------------------------------------------------------------------------------------


@op
def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up with gate, up = the halves of x. x [T, 2 I] -> [T, I]."""
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)


@op
def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    return F.gelu(x, approximate="tanh")


@op
def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), Φ the standard normal distribution function."""
    return F.gelu(x)


# Writing K and V ----------------------------------------------------------------------------------------------------


def _write(pages: Tensor, scales: Tensor | None, values: Tensor, slots: Tensor) -> None:
    """Put values [T, K, H] at slots [T] of pages [P, K, S, H], quantized where the pages are int8."""
    size = pages.shape[2]
    page, offset = slots // size, slots % size
    if scales is not None:
        wide = values.float()
        scale = (wide.abs().amax(-1) / 127).clamp_(min=torch.finfo(scales.dtype).tiny).to(scales.dtype)  # [T, K]
        scales[page, :, offset] = scale
        values = (wide / scale.float().unsqueeze(-1)).round_().clamp_(-127, 127)
    pages[page, :, offset] = values.to(pages.dtype)


@op
def write_kv(k: Tensor, v: Tensor, slots: Tensor, cache: KVLayer) -> None:
    """Store k, v [T, K, H] in the pages: row t at page slots[t] // S, offset slots[t] % S.

    Rounded to the pages' dtype; int8 pages get round(x / scale) with scale = max|x| / 127 of the row and head.
    """
    _write(cache.k, cache.k_scale, k, slots)
    _write(cache.v, cache.v_scale, v, slots)


@op
def qk_norm_rotary_and_write_kv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    slots: Tensor,
    cache: KVLayer,
) -> Tensor:
    """Normalise and rotate q and k, store k and v in the pages, return q [T, N, H] in qkv's dtype.

    qkv [T, (N + 2 K) H] holds the heads of q, then k, then v. `q_norm`, `k_norm` [H]: weights of an RMS norm over each
    head. cos, sin [context, R / 2] float32 are rows by position; the first R elements of each head are rotated, the
    rest stays. Element i is paired with i + R / 2, or, interleaved, 2 i with 2 i + 1:
    (a, b) -> (a cos - b sin, b cos + a sin). Stored as `write_kv` does.
    """
    kv_heads, size = cache.k.shape[1], cache.k.shape[3]
    heads = qkv.unflatten(-1, (-1, size))  # [T, N + 2 K, H]
    queries = heads.shape[1] - 2 * kv_heads
    turned, v = heads[:, : queries + kv_heads].float(), heads[:, queries + kv_heads :]
    assert (q_norm is None) == (k_norm is None), "both norms or none"
    if q_norm is not None and k_norm is not None:
        weights = torch.cat((q_norm.expand(queries, -1), k_norm.expand(kv_heads, -1)))  # [N + K, H]
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True).add_(eps)) * weights
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, R / 2]
    half = cos.shape[-1]
    rest = turned[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2]
        pairs = torch.stack((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)), dim=-1).flatten(-2)
        turned = torch.cat((pairs, rest), dim=-1)
    else:
        a, b = turned[..., :half], turned[..., half : 2 * half]
        turned = torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s), rest), dim=-1)
    turned = turned.to(qkv.dtype)
    _write(cache.k, cache.k_scale, turned[:, queries:], slots)
    _write(cache.v, cache.v_scale, v, slots)
    return turned[:, :queries]


# Attention ----------------------------------------------------------------------------------------------------------


@op
def paged_attention(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of this step's rows to all K and V of their sequences. q [T, N, H] -> [T, N, H], q's dtype.

    A row at position p sees j <= p, with `window` only j > p - window. Its score is s = scale · q·k, then
    softcap · tanh(s / softcap), then + alibi[n] · (j - p) with alibi [N] float32. Head n reads kv head n // G.
    """
    out = torch.empty_like(q)
    starts, lengths = sequences.query_starts.tolist(), sequences.lengths.tolist()
    decodes = sequences.decodes
    if decodes:
        args = (cache, sequences, lengths[:decodes], scale, alibi, window, softcap)
        _attend_decodes(q[:decodes], out[:decodes], *args)
    for index in range(decodes, len(lengths)):
        first, last = starts[index], starts[index + 1]
        if first < last:
            args = (cache, sequences.page_table[index : index + 1], lengths[index], scale, alibi, window, softcap)
            _attend_prefill(q[first:last], out[first:last], *args)
    return out


def _gather(pages: Tensor, scales: Tensor | None, table: Tensor) -> Tensor:
    """The tokens of page tables [b, m] one behind another: [b, K, m S, H] float32."""
    kv_heads, size, width = pages.shape[1:]
    count, m = table.shape
    heads = torch.arange(kv_heads, device=table.device, dtype=table.dtype).unsqueeze(-1)
    rows = torch.add(heads, table.unsqueeze(1), alpha=kv_heads).flatten()  # [b K m] of the pages seen as [P K, S, H]
    found = pages.flatten(0, 1).index_select(0, rows).float()
    if scales is not None:
        found *= scales.flatten(0, 1).index_select(0, rows).unsqueeze(-1)
    return found.view(count, kv_heads, m * size, width)


def _attend_decodes(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    lengths: list[int],
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """One row per sequence, as many sequences at once as keep their gathered K and V in the processor's cache."""
    kv_heads, size, width = cache.k.shape[1:]
    heads = q.shape[1]
    firsts = [max(0, length - window) // size if window else 0 for length in lengths]  # first page that is seen
    counts = [-(-length // size) - first for length, first in zip(lengths, firsts, strict=True)]
    group = max(1, GATHER_ELEMENTS // (max(counts) * size * kv_heads * width))
    queries = q.float().mul(scale).view(-1, kv_heads, heads // kv_heads, width)  # [b, K, G, H]
    for begin in range(0, len(lengths), group):
        part = slice(begin, min(begin + group, len(lengths)))
        m = max(counts[part])
        ends = sequences.lengths[part].unsqueeze(-1)  # [b, 1]
        offset = torch.tensor(firsts[part], device=q.device).unsqueeze(-1)
        column = torch.arange(m, device=q.device) + offset
        table = sequences.page_table[part].gather(1, column.where(column * size < ends, offset))
        position = torch.arange(m * size, device=q.device) + offset * size  # [b, m S]
        hidden = position >= ends
        if window:
            hidden |= position < ends - window
        k, v = _gather(cache.k, cache.k_scale, table), _gather(cache.v, cache.v_scale, table)
        scores = queries[part] @ k.transpose(-1, -2)  # [b, K, G, m S]
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if alibi is not None:
            scores += alibi.view(kv_heads, -1, 1) * (position - (ends - 1)).view(-1, 1, 1, m * size)
        scores.masked_fill_(hidden.view(-1, 1, 1, m * size), -torch.inf)
        # What lies behind a sequence's end was never written: 0 · NaN would be NaN.
        shortest = min(n - f * size for n, f in zip(lengths[part], firsts[part], strict=True))
        v[:, :, shortest:].masked_fill_(hidden[:, None, shortest:, None], 0)
        out[part] = (scores.softmax(-1) @ v).view(-1, heads, width)


def _attend_prefill(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    table: Tensor,
    length: int,
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """The rows [n, N, H] of one sequence, its last n positions; masks are made for a block of rows at a time."""
    kv_heads, size = cache.k.shape[1:3]
    rows, heads = q.shape[:2]
    start = length - rows
    first = max(0, start + 1 - window) if window else 0  # first position that is seen
    table = table[:, first // size : -(-length // size)]
    seen = slice(first % size, first % size + length - first)
    k = _gather(cache.k, cache.k_scale, table)[:, :, seen]
    v = _gather(cache.v, cache.v_scale, table)[:, :, seen]
    queries = q.float().transpose(0, 1).unsqueeze(0)  # [1, N, n, H]
    if start == 0 and alibi is None and softcap is None and (not window or window >= length):
        result = F.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out.copy_(result[0].transpose(0, 1))
        return
    block = max(1, MASK_ELEMENTS // (heads * (length - first)))
    position = torch.arange(first, length, device=q.device)
    for begin in range(0, rows, block):
        row = torch.arange(start + begin, start + min(begin + block, rows), device=q.device).unsqueeze(-1)
        hidden = position > row
        if window:
            hidden |= position <= row - window
        bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)  # [n, L]
        if alibi is not None:
            bias = alibi.view(-1, 1, 1) * (position - row) + bias  # [N, n, L]
        part = queries[:, :, begin : begin + block]
        if softcap is None:
            result = F.scaled_dot_product_attention(part, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        else:
            grouped = part.unflatten(1, (kv_heads, -1))  # [1, K, G, n, H]
            scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
            scores = scores.flatten(1, 2) + bias
            result = (scores.softmax(-1).unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)
        out[begin : begin + block] = result[0].transpose(0, 1)


# Pages --------------------------------------------------------------------------------------------------------------


@op
def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """pages[dst[i]] = pages[src[i]]. pages [P, ...]; src, dst [C] int64; no page is in both."""
    pages.index_copy_(0, dst, pages.index_select(0, src))


# Log-probabilities --------------------------------------------------------------------------------------------------


@op
def token_logprobs(logits: Tensor, targets: Tensor, top: int) -> TokenLogprobs:
    """log softmax(logits)[target], its rank and the `top` most likely tokens, row by row.

    logits [T, V] float32, targets [T] int64. A token's rank is 1 + the number of tokens that are strictly more likely.
    `top` may exceed V: all are given then.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, targets.unsqueeze(-1))
    ranks = (logits > chosen).sum(-1).add_(1)
    best = logits.topk(min(top, logits.shape[-1]))
    return TokenLogprobs((chosen - norm).squeeze(-1), ranks, best.values - norm, best.indices)


@op
def logprobs_of(hidden: Tensor, head: Tensor, targets: Tensor, top: int = 0) -> TokenLogprobs:
    """`token_logprobs` of the logits hidden · headᵀ. hidden [T, D], head [V, D], targets [T] int64.

    The logits are computed in chunks of rows, never T × V at once.
    """
    rows = max(1, LOGIT_ELEMENTS // head.shape[0])
    parts = [
        token_logprobs(F.linear(part, head).float(), wanted, top)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
