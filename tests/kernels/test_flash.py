"""flash-attn's place: what is refused and how it says so, and what its functions are given. It is not installed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.kernels import flash, ops
from tandem.kernels.flash import FlashUnavailable
from tandem.kernels.ops import KVLayer, Sequences

HALF, BRAIN = torch.float16, torch.bfloat16


def attend_densely(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], table: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """What flash-attn documents of one query block [n, N, H] per sequence over pages [P, S, K, H]."""
    found: list[Tensor] = []
    left = options["window_size"][0]
    for query, length, pages in zip(q, lengths, table.tolist(), strict=True):
        keys, values = (x[pages[: -(-length // k.shape[1])]].flatten(0, 1)[:length].double() for x in (k, v))
        heads = query.shape[1] // k.shape[2]
        scores = (
            torch.einsum("nhd,lhd->hnl", query.double(), keys.repeat_interleave(heads, 1)) * options["softmax_scale"]
        )
        if options["softcap"]:
            scores = options["softcap"] * (scores / options["softcap"]).tanh()
        behind = torch.arange(length - len(query), length).unsqueeze(-1) - torch.arange(length)  # [n, L]
        if options["alibi_slopes"] is not None:
            scores = scores - options["alibi_slopes"].double().view(-1, 1, 1) * behind.abs()
        hidden = (behind < 0) | ((behind > left) if left >= 0 else False)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append(torch.einsum("hnl,lhd->nhd", weights, values.repeat_interleave(heads, 1)).to(query.dtype))
    return found


def with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, **options: Any
) -> Tensor:
    assert q.dim() == 4 and q.shape[1] == 1 and options["causal"] and k.stride(-1) == v.stride(-1) == 1
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    return torch.stack(attend_densely(q, k, v, cache_seqlens.tolist(), block_table, options))


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor,
    **options: Any,
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and options["causal"]
    rows, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert int(cu_seqlens_q[0]) == int(cu_seqlens_k[0]) == 0 and sum(rows) == len(q)
    assert max(rows) <= max_seqlen_q and max(lengths) <= max_seqlen_k
    return torch.cat(attend_densely(q.split(rows), k, v, lengths, block_table, options))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in flash-attn's place with its documented signatures and meaning."""
    fake = types.ModuleType("flash_attn")
    fake.__spec__ = types.SimpleNamespace(name="flash_attn")  # type: ignore[assignment]
    vars(fake).update(flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    with pytest.raises(FlashUnavailable, match=r"flash-attn is not installed: pip install tandem\[flash\]"):
        flash.check(128, 256, HALF, HALF, False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "given, said",
    [
        ((128, 64, HALF, HALF, False), "multiple of 256 tokens, not 64"),
        ((128, 256, HALF, torch.int8, False), "int8 KV pages"),
        ((128, 256, torch.float32, torch.float32, False), "not torch.float32 and torch.float32"),
        ((128, 256, HALF, BRAIN, False), "not torch.float16 and torch.bfloat16"),
        ((100, 256, HALF, HALF, False), "not 100"),
        ((264, 256, HALF, HALF, False), "not 264"),
        ((128, 256, HALF, HALF, True), "not deterministic"),
    ],
)
def test_what_is_refused(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(FlashUnavailable, match=said):
        flash.check(*given)


@pytest.mark.usefixtures("installed")
def test_what_is_served() -> None:
    for head, page, dtype in ((64, 256, HALF), (128, 512, BRAIN), (256, 256, BRAIN)):
        flash.check(head, page, dtype, dtype, False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "options",
    [{}, {"alibi": torch.tensor([0.5, 0.03, 0.2, 0.1]), "window": 70, "softcap": 2.0}, {"window": 1}],
    ids=["plain", "all", "window 1"],
)
@pytest.mark.parametrize("shape", [[(300, 1), (5, 1)], [(300, 1), (280, 30), (7, 7)], [(260, 4)]])
def test_arguments(shape: list[tuple[int, int]], options: dict[str, Any]) -> None:
    """What our call means by flash-attn's documentation is what `ops.paged_attention` defines."""
    generator = torch.Generator().manual_seed(5)
    counts = [rows for _, rows in shape]
    lengths = [length for length, _ in shape]
    k, v = torch.randn(2, 8, 2, 256, 8, generator=generator).half()
    sequences = Sequences(
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor(lengths).int(),
        torch.randperm(8, generator=generator)[: 2 * len(shape)].view(-1, 2).int(),
        counts.count(1),
        max(counts),
        max(lengths),
    )
    q = torch.randn(sum(counts), 4, 8, generator=generator).half()
    found = flash.attend(q, KVLayer(k, v), sequences, 0.3, **options)
    expected = ops.paged_attention(q, KVLayer(k, v), sequences, 0.3, **options)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
