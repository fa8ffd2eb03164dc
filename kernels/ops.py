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

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention
from .attention import decode_chunks as decode_chunks
from .dispatch import op as op
from .forms import PANEL as PANEL
from .forms import Int8 as Int8
from .forms import KVLayer as KVLayer
from .forms import Packed as Packed
from .forms import PackedInt8 as PackedInt8
from .forms import Sequences as Sequences
from .forms import TokenLogprobs as TokenLogprobs

Activation = Literal["silu_and_mul", "gelu_tanh", "gelu"]

# Rows of a product in a fixed order on a CPU: with 16 a single float32 row takes 0.75 of the time, but a prompt of 512
# 1.2 (bfloat16 1.35) times as long, and 32 rows 1.25 (1.4) times.
BLOCK_ROWS = 32
# Float32 logits that `logprobs_of` holds at once, in elements (64 MiB).
LOGIT_ELEMENTS = 1 << 24
# The same on a CUDA device, in the dtype of the weights (128 MiB in 16 bits): each round reads the whole head, so it
# should have many rows. At V = 128k there are 512, and arithmetic bounds the matrix product.
DEVICE_LOGIT_ELEMENTS = 1 << 26


# Rows in int8 ---------------------------------------------------------------------------------------------------------


@op
def quantize_rows(x: Tensor) -> Int8:
    """x [R, D] as int8 with scale = max|x| / 127 of each row, to nearest, ties to even. A row of zeros stays zero.

    The sums of what is quantized are exact in whole numbers, so they have the same bits in any order.
    """
    wide = x.float()
    scale = (wide.abs().amax(-1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return Int8((wide / scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale)


# Normalisation ------------------------------------------------------------------------------------------------------


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps), rounded to weight's dtype, times weight [D], over the last dimension of x [..., D].

    The result has x's dtype. weight has it, too, or is float32, and then only the result is rounded.

    With `residual` (x's shape and dtype) it is the sum that is normalised, and `residual` becomes that sum, in place.
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(weight.dtype).mul_(weight).to(x.dtype)


@op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension. x [T, D], weight and bias [D].

    With `residual` (x's shape and dtype) it is the sum that is normalised, and `residual` becomes that sum, in place.
    """
    if residual is not None:
        x = residual.add_(x)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@op
def rms_norm_int8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Int8:
    """`quantize_rows(rms_norm(…))`, x [T, D]."""
    return quantize_rows(rms_norm(x, weight, eps, residual))


@op
def layer_norm_int8(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Int8:
    """`quantize_rows(layer_norm(…))`, x [T, D]."""
    return quantize_rows(layer_norm(x, weight, bias, eps, residual))


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


# Matrices -----------------------------------------------------------------------------------------------------------


@op
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    deterministic: bool = False,
) -> Tensor:
    """activation(x · weightᵀ + bias). x [T, D], weight [O, D], bias [O] -> [T, O], silu_and_mul [T, O / 2]; x's dtype.

    Sums are rounded to x's dtype before the activation, which is the operation of that name. `deterministic`: a row's
    bits depend on that row, weight and bias, not on T or on the rows beside it.
    """
    if not deterministic:
        return activate(F.linear(x, weight, bias), activation)
    return activate(in_blocks(lambda rows: F.linear(rows, weight, bias), x), activation, by_row=True)


def activate(x: Tensor, activation: Activation | None, by_row: bool = False) -> Tensor:
    """The operation named `activation` of x [T, I]. `by_row`: one row at a time.

    On CPUs torch computes what is left behind the last whole vector of a thread's share in another way, which rounds
    otherwise: in a row by itself those are the same elements whatever T is.
    """
    if activation is None:
        return x
    apply = {"silu_and_mul": silu_and_mul, "gelu_tanh": gelu_tanh, "gelu": gelu}[activation]
    return torch.stack([apply(row) for row in x]) if by_row else apply(x)


def in_blocks(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) [T, O] of x [T, D], BLOCK_ROWS rows at a time, the last block filled up with zeros.

    Libraries choose the order of a product's sums by its shape, so that 1 row, 2 rows and 257 rows have other bits
    (oneDNN and MKL, in all dtypes). Products of one shape have one order, the same for every row in them.
    """
    count = x.shape[0]
    blocks = F.pad(x, (0, 0, 0, -count % BLOCK_ROWS)).split(BLOCK_ROWS)
    return torch.cat([product(block) for block in blocks])[:count]


@op
def pack(weight: Tensor, activation: Activation | None = None) -> Packed | None:
    """weight [O, D] as `packed_linear` takes it, if the backend has such an order; `activation`: what comes behind it.

    A float32 matrix whose numbers all are bfloat16's is kept in bfloat16, which changes no result.
    """
    return None


@op
def packed_linear(
    x: Tensor, weight: Packed, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """`linear` with a packed matrix. A row's bits depend on that row, weight and bias only."""
    return linear(x, weight.unpack().to(x.dtype), bias, activation, deterministic=True)


@op
def linear_int8(
    x: Tensor,
    weight: Int8,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`linear` with an int8 matrix [O, D] and its outputs' scales: activation((x · valuesᵀ) · scale + bias).

    Values are multiplied as x's dtype or float32, which hold them exactly; the scale multiplies the float32 sum. Where
    there are many rows and it is not `deterministic`, a backend may multiply by round(values · scale) in x's dtype.
    """
    values, scale = weight.values.float(), weight.scale

    def product(rows: Tensor) -> Tensor:
        sums = F.linear(rows.float(), values) * scale
        return (sums if bias is None else sums + bias.float()).to(x.dtype)

    return activate(in_blocks(product, x) if deterministic else product(x), activation, by_row=deterministic)


@op
def linear_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8,
    bias: Tensor | None,
    activation: Activation | None,
    dtype: torch.dtype,
) -> Tensor:
    """activation((x · valuesᵀ) · x_scale · scale + bias) in `dtype`; x [T, D] and x_scale [T] from `quantize_rows`.

    Products and sums are whole numbers (int32): a row's bits depend on that row, weight and bias only.
    """
    sums = torch._int_mm(x, weight.values.T).float()  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    y = sums * x_scale.unsqueeze(-1) * weight.scale
    return activate((y if bias is None else y + bias.float()).to(dtype), activation, by_row=True)


@op
def pack_int8(values: Tensor, scale: Tensor, depth: int, activation: Activation | None = None) -> PackedInt8 | None:
    """values [O, D] int8 and scale [O] as `packed_linear_int8` takes them, if the backend has such an order.

    `depth` 2: x stays as it is (`linear_int8`); 4: its rows are quantized (`linear_w8a8`). `activation`: what comes
    behind it.
    """
    return None


@op
def packed_linear_int8(
    x: Tensor, weight: PackedInt8, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """`linear_int8` or, with depth 4, `linear_w8a8`. A row's bits depend on that row, weight and bias only."""
    plain = weight.unpack()
    if weight.depth == 4:
        return linear_w8a8(*quantize_rows(x), plain, bias, activation, x.dtype)
    return linear_int8(x, plain, bias, activation, deterministic=True)


@op
def lora(x: Tensor, a: Tensor, b: Tensor, outs: tuple[int, ...], slots: Tensor, y: Tensor) -> None:
    """y[t] += B · (A · x[t]), in place, with A and B of adapter slots[t]; a row of slot 0 keeps its bits.

    x [T, D] and y [T, O], slots [T] int64 in 0 … S. a [S, n r, D] and b [S, r, O] hold adapter s as entry s - 1. O is
    `outs`, the outputs of n matrices one behind another; rows i r … (i + 1) r of A are the i-th one's, r the rank.

    Sums are float32, and so is what lies between A and B; y is rounded once. A row's bits depend on that row of x and
    y and on its adapter, not on T or on the rows beside it.
    """
    for slot in slots.unique().tolist():
        if slot:
            rows = (slots == slot).nonzero().squeeze(1)
            y[rows] = (y[rows].float() + _lora_term(x[rows].float(), a[slot - 1], b[slot - 1], outs)).to(y.dtype)


def _lora_term(x: Tensor, a: Tensor, b: Tensor, outs: tuple[int, ...]) -> Tensor:
    """x [T, D] float32, a [n r, D], b [r, O] -> B · (A · x) [T, O] float32."""
    a, parts = a.float(), b.float().split_with_sizes(outs, 1)
    rank = b.shape[0]

    def term(rows: Tensor) -> Tensor:
        inner = F.linear(rows, a).split(rank, 1)
        return torch.cat([part @ up for part, up in zip(inner, parts, strict=True)], 1)

    return in_blocks(term, x)


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

    With `sequences.deterministic` a row has the same bits in any batch, in any chunk of its prompt and as a decode.
    """
    return attention.attend(q, cache, sequences, scale, alibi, window, softcap)


@op
def attention_work(lengths: Tensor, decodes: int, capacity: int, prefixes: Tensor | None = None) -> Tensor:
    """The decode rows of a step cut into chunks of K and V: [2 + 5 or 10, capacity] int32, for all layers of a step.

    lengths [B] int32 as in Sequences. Row r takes `decode_chunks(length)` consecutive slots for partial results; the
    sum over rows must not exceed `capacity` (at least 2 and at least `decodes`). Rows that do not fit get NaN from
    `paged_attention`.

    prefixes [2, B] int32, for groups of neighbouring rows whose first tokens lie in the same pages: the first row of
    the row's group, and how many tokens the whole group shares, fewer than any of its rows has. 0 tokens: none.

    Row 0 of the result holds the numbers of entries and of shared entries, row 1 the first slot of each decode row (-1
    where it does not fit), then come the fields of the entries: row of the page table, first query row, number of
    query rows, first chunk, chunk behind the last; then those of the shared entries, where there are prefixes. What
    lies behind the last entry may be anything. Reads 4 bytes per row, writes 24 per entry, once per step.
    """
    return attention.attention_work(lengths, decodes, capacity, prefixes)


# Pages --------------------------------------------------------------------------------------------------------------


@op
def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """pages[dst[i]] = pages[src[i]]. pages [P, ...]; src, dst [C] int64; no page is in both."""
    pages.index_copy_(0, dst, pages.index_select(0, src))


# Log-probabilities --------------------------------------------------------------------------------------------------


@op
def token_logprobs(logits: Tensor, targets: Tensor, top: int, factors: Tensor | None = None) -> TokenLogprobs:
    """log softmax(logits)[target], its rank and the `top` most likely tokens, row by row.

    logits [T, V] of any float dtype, targets [T] int64. A token's rank is 1 + the number of tokens that are strictly
    more likely. A target of -1 asks for no token: value and rank are 0. `top` may exceed V: all are given then.
    `factors` [T] float32, positive: the logits of row t are multiplied by factors[t], the inverse of a temperature.
    A row's bits do not depend on T, and those of a factor of 1 are those without factors.
    """
    logits = logits.float()
    scaled = logits if factors is None else logits * factors.unsqueeze(-1)
    logprobs = scaled.log_softmax(-1)  # a row is one thread's; one row's logsumexp is divided among all
    place = targets.clamp(min=0).unsqueeze(-1)
    unasked = targets < 0
    ranks = (logits > logits.gather(-1, place)).sum(-1).add_(1).masked_fill_(unasked, 0)
    best = logits.topk(min(top, logits.shape[-1])).indices
    values = logprobs.gather(-1, place).squeeze(-1).masked_fill_(unasked, 0)
    return TokenLogprobs(values, ranks, logprobs.gather(-1, best), best)


@op
def logprobs_of(
    hidden: Tensor, head: Tensor, targets: Tensor, top: int = 0, factors: Tensor | None = None
) -> TokenLogprobs:
    """`token_logprobs` of the logits hidden · headᵀ. hidden [T, D], head [V, D], targets [T] int64, factors [T].

    The logits are computed a few rows at a time, never T × V at once.
    """
    return logprobs_in_rounds(lambda rows: F.linear(rows, head), hidden, targets, top, head.shape[0], factors)


def logprobs_in_rounds(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    top: int,
    vocab_size: int,
    factors: Tensor | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of head(hidden) [T, V], LOGIT_ELEMENTS (on a CUDA device DEVICE_LOGIT_ELEMENTS) at a time."""
    rows = max(1, (LOGIT_ELEMENTS if hidden.device.type == "cpu" else DEVICE_LOGIT_ELEMENTS) // vocab_size)
    hiddens, wanted = hidden.split(rows), targets.split(rows)
    scales = [None] * len(hiddens) if factors is None else factors.split(rows)
    parts = [
        token_logprobs(head(part), ids, top, scale) for part, ids, scale in zip(hiddens, wanted, scales, strict=True)
    ]
    return TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
