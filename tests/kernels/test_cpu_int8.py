"""int8 in the C++ kernels against the definitions, with every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu import int8, product
from tandem.kernels.cpu.native import SETS, native
from tandem.kernels.ops import Activation, PackedInt8

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
    monkeypatch.setattr(int8, "native", lambda: chosen)
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
