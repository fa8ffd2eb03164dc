"""int8 in the C++ kernels against the definitions, with every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu import attention, int8, product, rows
from tandem.kernels.cpu.native import SETS, native
from tandem.kernels.ops import Activation, KVLayer, PackedInt8, Sequences

NATIVE = native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")

NAN, INF = float("nan"), float("inf")
CLOSE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1.6e-2, 1.6e-2)}  # relative, absolute
DTYPES = list(CLOSE)
SHAPES = [(16, 2), (5, 30), (7, 33), (64, 96), (100, 1026), (96, 2101)]  # outs, ins: K is visited in parts of 1,024
COUNTS = (1, 2, 3, 5, 6, 13, 64)


@pytest.fixture(params=SETS[1 : 1 + (NATIVE.set if NATIVE else 1)], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert NATIVE is not None
    chosen = replace(NATIVE, set=SETS.index(request.param))
    for module in (attention, int8, rows):
        monkeypatch.setattr(module, "native", lambda: chosen)
    yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def close(found: Tensor, expected: Tensor) -> None:
    relative, absolute = CLOSE[found.dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=relative, atol=absolute)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(outs: int, ins: int, depth: int, activation: Activation | None = None) -> PackedInt8:
    """With an output of zeros and outliers."""
    weight = noise(outs, ins, seed=outs) / ins**0.5
    weight[outs // 2], weight[:, 0] = 0, weight[:, 0] * 30
    rows = ops.quantize_rows.__wrapped__(weight)
    rows.values[0, :2] = -128  # no row of ours has it, but a checkpoint may
    packed = int8.pack_int8(*rows, depth, activation)
    assert packed is not None and packed.depth == depth
    assert torch.equal(packed.unpack().values, rows.values) and torch.equal(packed.unpack().scale, rows.scale)
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 123, 4096])
def test_rows_have_the_definitions_bits(size: int, dtype: torch.dtype) -> None:
    x = noise(40, size).to(dtype)
    x[1], x[2, 0], x[3], x[4], x[5, -1], x[6, size // 2] = 0, 1e4, 1e-42, 1e38, NAN, INF
    x[7] = torch.arange(size) / 127 * 0.5  # ties
    found, expected = int8.quantize_rows(x), ops.quantize_rows.__wrapped__(x)
    assert torch.equal(found.scale.isnan(), expected.scale.isnan()) and found.scale.isnan().sum() == 1
    whole = ~x.isnan().any(-1)
    assert torch.equal(found.scale[whole], expected.scale[whole])
    assert torch.equal(found.values[whole], expected.values[whole])


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs, ins", SHAPES)
def test_products_with_floats(outs: int, ins: int, dtype: torch.dtype, activation: Activation | None) -> None:
    if activation == "silu_and_mul" and outs % 32:
        assert int8.pack_int8(torch.ones(outs, ins, dtype=torch.int8), torch.ones(outs), 2, activation) is None
        return
    packed, bias, x = matrix(outs, ins, 2, activation), noise(outs).to(dtype), noise(67, ins, seed=3).to(dtype)
    for given in (bias, None):
        whole = int8.packed_linear_int8(x, packed, given, activation)
        close(whole, ops.packed_linear_int8.__wrapped__(x, packed, given, activation))
        for count in COUNTS:  # a row has the same bits in any company
            assert torch.equal(
                int8.packed_linear_int8(x[3 : 3 + count], packed, given, activation), whole[3 : 3 + count]
            )


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs, ins", SHAPES)
def test_products_with_int8(outs: int, ins: int, dtype: torch.dtype, activation: Activation | None) -> None:
    """Sums are whole: the definition's bits up to the activation."""
    if activation == "silu_and_mul" and outs % 32:
        return
    packed, bias, x = matrix(outs, ins, 4, activation), noise(outs).to(dtype), noise(67, ins, seed=3).to(dtype)
    x[0], x[1, 0], x[2] = 0, 1e3, -x[2].abs()
    for given in (bias, None):
        whole = int8.packed_linear_int8(x, packed, given, activation)
        expected = ops.packed_linear_int8.__wrapped__(x, packed, given, activation)
        if activation is None:
            assert torch.equal(whole, expected)
        close(whole, expected)
        for count in COUNTS:
            assert torch.equal(
                int8.packed_linear_int8(x[3 : 3 + count], packed, given, activation), whole[3 : 3 + count]
            )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_saturate(sign: int) -> None:
    ins = 8192
    packed = int8.pack_int8(torch.full((16, ins), 127, dtype=torch.int8), torch.ones(16), 4)
    assert packed is not None
    found = int8.packed_linear_int8(torch.full((2, ins), 127.0 * sign), packed)
    assert (found == 127 * 127 * ins * sign).all()


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_no_number_shows_in_its_row_alone(depth: int, bad: float) -> None:
    packed, x = matrix(16, 40, depth), noise(3, 40)
    alone = int8.packed_linear_int8(x, packed)
    x[1, 7] = bad
    found = int8.packed_linear_int8(x, packed)
    assert not found[1].isfinite().any() and torch.equal(found[::2], alone[::2])


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("rows", [3, 70])
def test_the_number_of_threads_does_not_show(rows: int, depth: int, two_threads: None) -> None:
    packed, x = matrix(640, 512, depth), noise(rows, 512)
    shared = int8.packed_linear_int8(x, packed)
    torch.set_num_threads(1)
    assert torch.equal(shared, int8.packed_linear_int8(x, packed))


def test_other_dtypes_are_the_definitions() -> None:
    packed, x = matrix(16, 40, 2), noise(3, 40).half()
    found = int8.packed_linear_int8(x, packed)
    assert found.dtype == torch.float16 and torch.equal(found, ops.packed_linear_int8.__wrapped__(x, packed))
    assert torch.equal(int8.quantize_rows(x).values, ops.quantize_rows.__wrapped__(x).values)


# K and V --------------------------------------------------------------------------------------------------------------


def pages(count: int, kv_heads: int, page: int, size: int) -> KVLayer:
    """Of a cache of two layers, the second's: pages are apart, and behind their values lie the scales, all NaN."""
    values = torch.full((count, 2, 2, kv_heads, page, size), -128, dtype=torch.int8)
    scales = torch.full((count, 2, 2, kv_heads, page), NAN, dtype=torch.float16)
    return KVLayer(values[:, 1, 0], values[:, 1, 1], scales[:, 1, 0], scales[:, 1, 1])


def same_pages(found: KVLayer, expected: KVLayer) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) if a.is_floating_point() else torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 40, 80, 128])
def test_writes_have_the_definitions_bits(size: int, dtype: torch.dtype) -> None:
    kv_heads, page, count = 2, 5, 11
    qkv = noise(count, 3 * kv_heads * size).to(dtype)
    qkv[1], qkv[2, ::7], qkv[3] = 0, 3000, qkv[3] * 1e-7
    slots = torch.randperm(4 * page, generator=torch.Generator().manual_seed(1))[:count]
    k, v = qkv.view(count, -1, size)[:, kv_heads:].split(kv_heads, 1)
    made = [pages(4, kv_heads, page, size) for _ in range(2)]
    rows.write_kv(k, v, slots, made[0])
    ops.write_kv.__wrapped__(k, v, slots, made[1])
    same_pages(*made)
    positions, still = torch.zeros(count, dtype=torch.int64), torch.zeros(1, 4)  # an angle of 0 turns nothing
    given = (None, None, 1e-6, positions, still + 1, still, False, slots)
    queries = rows.qk_norm_rotary_and_write_kv(qkv, *given, made[1])
    same_pages(*made)
    assert torch.equal(queries, qkv.view(count, -1, size)[:, :kv_heads])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_in_int8(interleaved: bool, dtype: torch.dtype) -> None:
    """Within a step of what the definition stores: how sums are rounded differs before they are."""
    count, kv_heads, page, size, half = 9, 2, 4, 40, 12
    qkv, norm = noise(count, 7 * size).to(dtype), 1 + noise(size, seed=2).to(dtype) / 8
    angles, slots = torch.rand(50, half, generator=torch.Generator().manual_seed(1)) * 6, torch.arange(count)
    given = (qkv, norm, norm, 1e-6, slots * 3, angles.cos(), angles.sin(), interleaved, slots)
    made = [pages(3, kv_heads, page, size) for _ in range(2)]
    close(
        rows.qk_norm_rotary_and_write_kv(*given, made[0]), ops.qk_norm_rotary_and_write_kv.__wrapped__(*given, made[1])
    )
    assert ((made[0].k.int() - made[1].k.int()).abs() <= 1).all() and torch.equal(made[0].v, made[1].v)
    assert made[0].k_scale is not None and made[1].k_scale is not None
    torch.testing.assert_close(made[0].k_scale, made[1].k_scale, rtol=1e-2, atol=0, equal_nan=True)


LENGTHS = [1, 15, 16, 17, 63, 64, 65, 129, 0, 200, 40]
ROWS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 77, 40]  # of this step: nine decodes, one of them padding, and two prompts


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"alibi": True, "window": 100}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, size, page", [(6, 2, 64, 16), (4, 4, 80, 24), (5, 1, 8, 7), (8, 2, 128, 32)])
def test_attention(
    heads: int, kv_heads: int, size: int, page: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """With NaN for the scale of every slot that no row may read."""
    generator = torch.Generator().manual_seed(size)
    width = -(-max(LENGTHS) // page)
    table = torch.randperm(len(LENGTHS) * width, generator=generator).view(-1, width).int()
    cache = pages(table.numel(), kv_heads, page, size)
    for row, length in enumerate(LENGTHS):
        at = torch.arange(length)
        slots = table[row, at // page] * page + at % page
        k, v = (
            torch.randn(2, length, kv_heads, size, generator=generator)
            * torch.arange(1, length + 1).view(-1, 1, 1)
            / 50
        )
        ops.write_kv.__wrapped__(k, v, slots.long(), cache)
    starts = torch.tensor([0, *ROWS]).cumsum(0).int()
    sequences = Sequences(starts, torch.tensor(LENGTHS).int(), table, 9, max(ROWS), max(LENGTHS), memo={})
    q = torch.randn(sum(ROWS), heads, size, generator=generator).to(dtype)
    if options.get("alibi"):
        options = options | {"alibi": torch.rand(heads, generator=generator)}
    found = attention.paged_attention(q, cache, sequences, size**-0.5, **options)
    close(found, ops.paged_attention.__wrapped__(q, cache, sequences, size**-0.5, **options))
    last = Sequences(torch.tensor([0, 1]).int(), torch.tensor([200]).int(), table[9:10], 1, 1, 200)
    alone = attention.paged_attention(q[85:86], cache, last, size**-0.5, **options)
    assert torch.equal(alone, found[85:86])  # the last row of the chunk, as a decode
