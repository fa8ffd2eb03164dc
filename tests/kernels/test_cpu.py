"""The C++ kernels against the definitions, with every instruction set that this processor has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tandem.kernels.cpu as backend
from tandem.kernels import ops, sampling
from tandem.kernels.cpu import activations, attention, low_rank, product, rows
from tandem.kernels.cpu.native import SETS, native
from tandem.kernels.ops import Activation, KVLayer, Sequences

NATIVE = native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")

NAN = float("nan")
CLOSE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1.6e-2, 1.6e-2)}  # relative, absolute
DTYPES = list(CLOSE)


@pytest.fixture(params=SETS[1 : 1 + (NATIVE.set if NATIVE else 1)], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert NATIVE is not None
    chosen = replace(NATIVE, set=SETS.index(request.param))
    for module in (activations, attention, low_rank, product, rows):
        monkeypatch.setattr(module, "native", lambda: chosen)
    yield


def close(found: Tensor, expected: Tensor) -> None:
    relative, absolute = CLOSE[found.dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=relative, atol=absolute)


@pytest.mark.parametrize("name", backend.__all__)
def test_same_signature(name: str) -> None:
    definition = getattr(ops, name, None) or getattr(sampling, name)
    assert inspect.signature(getattr(backend, name)) == inspect.signature(definition)


def test_nothing_else_is_public() -> None:
    assert {name for name, value in vars(backend).items() if inspect.isfunction(value)} == set(backend.__all__)


# Products -------------------------------------------------------------------------------------------------------------

KINDS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
SHAPES = [(16, 2), (5, 30), (7, 33), (64, 96), (100, 1026), (96, 2100)]  # outs, ins: K is visited in parts of 1,024


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
@pytest.mark.parametrize("x_dtype, w_dtype", KINDS)
@pytest.mark.parametrize("outs, ins", SHAPES)
def test_products(
    outs: int, ins: int, x_dtype: torch.dtype, w_dtype: torch.dtype, activation: Activation | None
) -> None:
    if activation == "silu_and_mul" and outs % 32:
        assert product.pack(torch.ones(outs, ins), activation) is None
        return
    generator = torch.Generator().manual_seed(outs)
    weight = (torch.randn(outs, ins, generator=generator) / ins**0.5).to(w_dtype)
    bias = torch.randn(outs, generator=generator).to(x_dtype)
    packed = product.pack(weight.to(x_dtype), activation)
    assert packed is not None and packed.data.dtype == w_dtype
    assert torch.equal(packed.unpack(), weight)
    x = torch.randn(67, ins, generator=generator).to(x_dtype)
    for given in (bias, None):
        whole = product.packed_linear(x, packed, given, activation)
        close(whole, ops.packed_linear.__wrapped__(x, packed, given, activation))
        for count in (1, 2, 3, 5, 6, 13, 64):  # a row has the same bits in any company
            assert torch.equal(product.packed_linear(x[3 : 3 + count], packed, given, activation), whole[3 : 3 + count])


def test_activations_far_from_zero() -> None:
    """Where eˣ leaves float32, and what is no number."""
    values = torch.tensor([-1e30, -200, -88.5, -87.2, -20, -1e-30, 0, 1e-30, 20, 87.2, 88.5, 200, 1e30, NAN])
    identity = product.pack(torch.eye(14))
    assert identity is not None
    for activation in ("gelu", "gelu_tanh"):
        found = product.packed_linear(values.diag(), identity, None, activation).diag()
        close(found[:-1], ops.activate(values[:-1], activation))
    x = torch.cat([values[:-1], torch.zeros(3)])
    both = product.pack(torch.cat([torch.eye(16), torch.eye(16)]), "silu_and_mul")
    assert both is not None
    found = product.packed_linear(x.clamp(-1e15, 1e15).diag(), both, None, "silu_and_mul").diag()
    close(found, torch.nn.functional.silu(x.clamp(-1e15, 1e15)) * x.clamp(-1e15, 1e15))
    nothing = product.packed_linear(torch.full((1, 16), NAN), both, None, "silu_and_mul")
    assert nothing.isnan().all()


def test_what_is_not_packed() -> None:
    assert product.pack(torch.ones(16, 4, dtype=torch.float16)) is None
    exact, inexact = torch.full((16, 4), 1.5), torch.full((16, 4), 1.1)
    packed = [product.pack(weight) for weight in (exact, inexact)]
    assert [p.data.dtype for p in packed if p is not None] == [torch.bfloat16, torch.float32]


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 16, 40, 768])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms(size: int, dtype: torch.dtype, with_residual: bool) -> None:
    x, residual = (torch.randn(9, size) * 3 + 1).to(dtype), torch.randn(9, size).to(dtype)
    weight, bias = torch.randn(2, size).to(dtype)

    def run(operation: Any, *parameters: Any, count: int = 9) -> tuple[Tensor, Tensor]:
        kept = residual[:count].clone()
        return operation(x[:count], *parameters, kept if with_residual else None), kept

    for name, parameters in (("rms_norm", (weight, 1e-5)), ("layer_norm", (weight, bias, 1e-5))):
        found, kept = run(getattr(rows, name), *parameters)
        expected, sums = run(getattr(ops, name).__wrapped__, *parameters)
        close(found, expected)
        assert torch.equal(kept, sums)
        assert torch.equal(run(getattr(rows, name), *parameters, count=2)[0], found[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("size, rotated", [(16, 16), (40, 12), (64, 64), (80, 48)])
def test_rotary(size: int, rotated: int, norms: bool, interleaved: bool, dtype: torch.dtype) -> None:
    heads, kv_heads, page, count = 6, 2, 5, 11
    qkv = torch.randn(count, (heads + 2 * kv_heads) * size).to(dtype)
    q_norm, k_norm = torch.rand(2, size).to(dtype) if norms else (None, None)
    positions, slots = torch.randint(0, 50, (count,)), torch.randperm(4 * page)[:count]
    angles = torch.rand(50, rotated // 2) * 6
    made = [KVLayer(*torch.full((4, 2, kv_heads, page, size), NAN, dtype=dtype).unbind(1)) for _ in range(2)]

    def run(operation: Any, cache: KVLayer) -> Tensor:
        return operation(qkv, q_norm, k_norm, 1e-6, positions, angles.cos(), angles.sin(), interleaved, slots, cache)

    close(run(rows.qk_norm_rotary_and_write_kv, made[0]), run(ops.qk_norm_rotary_and_write_kv.__wrapped__, made[1]))
    relative, absolute = CLOSE[dtype]
    for found, expected in zip(made[0][:2], made[1][:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=relative, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes(dtype: torch.dtype) -> None:
    qkv, slots = torch.randn(7, 8, 20).to(dtype), torch.randperm(12)[:7]
    made = [KVLayer(*torch.zeros(2, 3, 3, 4, 20, dtype=dtype).unbind()) for _ in range(2)]  # 3 pages of 4, 3 heads
    for write, cache in zip((rows.write_kv, ops.write_kv.__wrapped__), made, strict=True):
        write(qkv[:, 2:5], qkv[:, 5:], slots, cache)
    assert torch.equal(made[0].k, made[1].k) and torch.equal(made[0].v, made[1].v)


# Attention ------------------------------------------------------------------------------------------------------------

LAYOUTS = [(6, 2, 64, 16), (4, 4, 40, 24), (71, 1, 8, 7), (8, 2, 128, 32)]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 129, 0, 200, 40]
COUNTS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 77, 40]  # rows of this step: nine decodes, one of them padding, and two prompts


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"alibi": True, "window": 100}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, size, page", [(6, 2, 64, 16), (4, 4, 40, 24), (71, 1, 8, 7), (8, 2, 128, 32)]
)
def test_attention(
    heads: int, kv_heads: int, size: int, page: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """With NaN in every slot that no row may read."""
    generator = torch.Generator().manual_seed(size)
    width = -(-max(LENGTHS) // page)
    pages = len(LENGTHS) * width
    table = torch.randperm(pages, generator=generator).view(-1, width).int()
    k, v = torch.randn(pages, 2, kv_heads, page, size, generator=generator).to(dtype).unbind(1)
    for row, length in enumerate(LENGTHS):
        for at in range(length, width * page):
            k[table[row, at // page], :, at % page] = v[table[row, at // page], :, at % page] = NAN
    starts = torch.tensor([0, *COUNTS]).cumsum(0).int()
    sequences = Sequences(starts, torch.tensor(LENGTHS).int(), table, 9, max(COUNTS), max(LENGTHS), memo={})
    q = torch.randn(sum(COUNTS), heads, size, generator=generator).to(dtype)
    if options.get("alibi"):
        options = options | {"alibi": torch.rand(heads, generator=generator)}
    found = attention.paged_attention(q, KVLayer(k, v), sequences, size**-0.5, **options)
    close(found, ops.paged_attention.__wrapped__(q, KVLayer(k, v), sequences, size**-0.5, **options))
    last = Sequences(torch.tensor([0, 1]).int(), torch.tensor([200]).int(), table[9:10], 1, 1, 200)
    alone = attention.paged_attention(q[85:86], KVLayer(k, v), last, size**-0.5, **options)
    assert torch.equal(alone, found[85:86])  # the last row of the chunk, as a decode


def test_a_broken_key_is_seen_in_its_sequence_alone() -> None:
    k, v = torch.randn(2, 4, 1, 16, 16)
    k[1, 0, 3, 5] = NAN
    starts, lengths, table = torch.tensor([0, 1, 2]), torch.tensor([20, 20]), torch.tensor([[0, 1], [2, 3]])
    sequences = Sequences(starts.int(), lengths.int(), table.int(), 2, 1, 20)
    found = attention.paged_attention(torch.randn(2, 2, 16), KVLayer(k, v), sequences, 0.25)
    assert found[0].isnan().all() and found[1].isfinite().all()


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs, ins, rank", [((16,), 16, 4), ((5, 70, 33), 37, 8), ((64, 20), 768, 16)])
def test_lora(outs: tuple[int, ...], ins: int, rank: int, dtype: torch.dtype) -> None:
    """Rows of slot 0 are not written, and a row has the same bits alone."""
    generator = torch.Generator().manual_seed(ins)
    a = (torch.randn(3, len(outs) * rank, ins, generator=generator) / ins**0.5).to(dtype)
    b, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, rank, sum(outs)), (67, ins)))
    slots = torch.randint(0, 4, (67,), generator=generator)
    before = torch.randn(67, sum(outs), generator=generator).to(dtype)
    found, expected = before.clone(), before.clone()
    low_rank.lora(x, a, b, outs, slots, found)
    ops.lora.__wrapped__(x, a, b, outs, slots, expected)
    close(found, expected)
    assert torch.equal(found[slots == 0], before[slots == 0])
    for count in (1, 2, 5):
        alone = before[3 : 3 + count].clone()
        low_rank.lora(x[3 : 3 + count], a, b, outs, slots[3 : 3 + count], alone)
        assert torch.equal(alone, found[3 : 3 + count])


@pytest.mark.parametrize("name", product.ACTIVATIONS[1:])
@pytest.mark.parametrize("x_dtype, w_dtype", KINDS)
def test_activations_by_themselves(name: Activation, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """The same bits as behind a product."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(4)).to(w_dtype).to(x_dtype)
    x, packed = torch.randn(5, 64).to(x_dtype), product.pack(weight, name)
    assert packed is not None
    sums = product.packed_linear(x, packed)
    assert torch.equal(getattr(activations, name)(sums), product.packed_linear(x, packed, None, name))
    odd = torch.randn(3, 2 * 37).to(x_dtype)
    close(getattr(activations, name)(odd), getattr(ops, name).__wrapped__(odd))
