"""Norms, activations, rotation, page writes and log-probabilities against loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tandem.kernels import dispatch, ops
from tandem.kernels.ops import KVLayer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 64), (5, 123), (17, 80)]


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """Tolerances: a few units in the last place."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 4 * eps}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, size: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, weight = 3 * noise(rows, size, dtype=dtype), noise(size, dtype=dtype, seed=1)
    residual = noise(rows, size, dtype=dtype, seed=2) if with_residual else None
    total = x if residual is None else x + residual
    out = ops.rms_norm(x, weight, 1e-5, residual)
    for row in range(rows):
        values = total[row].double()
        root = math.sqrt(sum(v * v for v in values.tolist()) / size + 1e-5)
        torch.testing.assert_close(out[row].double(), values / root * weight.double(), **rounding(dtype))
    if residual is not None:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_with_a_float32_weight_rounds_once(dtype: torch.dtype) -> None:
    x, weight = noise(5, 123, dtype=dtype), 1 + noise(123, seed=1) / 100
    out = ops.rms_norm(x, weight, 1e-5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert out.dtype == dtype
    assert (out == exact.to(dtype)).float().mean() > 0.999  # 0.73 with a rounding in between
    assert x.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(rows: int, size: int, with_residual: bool, dtype: torch.dtype) -> None:
    x = 3 * noise(rows, size, dtype=dtype) + 2
    weight, bias = noise(size, dtype=dtype, seed=1), noise(size, dtype=dtype, seed=3)
    residual = noise(rows, size, dtype=dtype, seed=2) if with_residual else None
    total = x if residual is None else x + residual
    out = ops.layer_norm(x, weight, bias, 1e-5, residual)
    for row in range(rows):
        values = total[row].double()
        mean = sum(values.tolist()) / size
        variance = sum((v - mean) ** 2 for v in values.tolist()) / size
        exact = (values - mean) / math.sqrt(variance + 1e-5) * weight.double() + bias.double()
        torch.testing.assert_close(out[row].double(), exact, **rounding(dtype))
    if residual is not None:
        assert torch.equal(residual, total)


def test_norms_keep_their_input() -> None:
    x, before = noise(5, 123), noise(5, 123)
    ops.rms_norm(x, torch.ones(123), 1e-6)
    ops.layer_norm(x, torch.ones(123), torch.zeros(123), 1e-6)
    ops.rms_norm(x, torch.ones(123), 1e-6, noise(5, 123, seed=2))
    assert torch.equal(x, before)


def test_statistics_are_float32() -> None:
    """In float16 the sum of squares of 300 · 1000 values would be infinite."""
    x = torch.full((1, 1000), 300.0, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(1000, dtype=torch.float16), 0.0), x / 300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = 3 * noise(5, 246, dtype=dtype)
    for name in ("silu_and_mul", "gelu", "gelu_tanh"):
        out = getattr(ops, name)(x)
        assert out.dtype == dtype
        for row in range(5):
            values = [float(v) for v in x[row]]
            if name == "silu_and_mul":
                exact = [g / (1 + math.exp(-g)) * u for g, u in zip(values[:123], values[123:], strict=True)]
            elif name == "gelu":
                exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in values]
            else:
                exact = [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in values]
            # Near 0 the error is that of erf and tanh, which AVX-512's versions round otherwise than AVX2's.
            close = rounding(dtype) | {"atol": 2 * rounding(dtype)["atol"]}
            torch.testing.assert_close(out[row].double(), torch.tensor(exact).double(), **close)


def empty_cache(pages: int, kv_heads: int, size: int, width: int, dtype: torch.dtype) -> KVLayer:
    if dtype == torch.int8:
        scale = torch.full((pages, kv_heads, size), torch.nan, dtype=torch.float16)
        values = torch.full((pages, kv_heads, size, width), 99, dtype=dtype)
        return KVLayer(values, values.clone(), scale, scale.clone())
    values = torch.full((pages, kv_heads, size, width), torch.nan, dtype=dtype)
    return KVLayer(values, values.clone())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 23])
def test_write_kv(rows: int, dtype: torch.dtype) -> None:
    """Each row is found where its slot says, all other slots are untouched. Pages of 5, strided input."""
    cache = empty_cache(6, 3, 5, 8, dtype)
    k, v = noise(rows, 3, 2, 8).unbind(2)
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:rows]
    ops.write_kv(k, v, slots, cache)
    for values, pages, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        untouched = torch.ones(6, 5, dtype=torch.bool)
        for row, slot in enumerate(slots.tolist()):
            page, offset = divmod(slot, 5)
            untouched[page, offset] = False
            for head in range(3):
                stored = pages[page, head, offset]
                if scales is None:
                    assert torch.equal(stored, values[row, head].to(dtype))
                else:
                    scale = float(scales[page, head, offset])
                    assert scale == pytest.approx(float(values[row, head].abs().max()) / 127, rel=1e-3)
                    assert (stored.double() * scale - values[row, head].double()).abs().max() < 0.51 * scale
        rest = pages.transpose(1, 2)[untouched]
        assert (rest == 99).all() if dtype == torch.int8 else rest.isnan().all()


def test_int8_pages_hold_zeros() -> None:
    cache = empty_cache(1, 1, 2, 4, torch.int8)
    ops.write_kv(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.tensor([1]), cache)
    assert cache.k_scale is not None
    assert (cache.k[0, 0, 1] * cache.k_scale[0, 0, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("rotated", [16, 10, 2])
def test_qk_norm_rotary_and_write_kv(rotated: int, with_norms: bool, interleaved: bool, dtype: torch.dtype) -> None:
    rows, queries, kv_heads, width = 7, 6, 2, 16
    qkv = noise(rows, (queries + 2 * kv_heads) * width, dtype=dtype)
    before = qkv.clone()
    weights = (noise(width, dtype=dtype, seed=1), noise(width, dtype=dtype, seed=2)) if with_norms else (None, None)
    positions = torch.tensor([0, 1, 2, 9, 4, 31, 30])
    angles = torch.outer(torch.arange(32), 0.7 ** torch.arange(rotated // 2))
    slots = torch.tensor([3, 14, 0, 7, 8, 9, 11])
    cache = empty_cache(3, kv_heads, 5, width, dtype)
    q = ops.qk_norm_rotary_and_write_kv(
        qkv, *weights, 1e-6, positions, angles.cos(), angles.sin(), interleaved, slots, cache
    )
    assert (q.shape, q.dtype) == ((rows, queries, width), dtype)
    assert torch.equal(qkv, before)
    heads = qkv.view(rows, -1, width).double()
    for row in range(rows):
        page, offset = divmod(int(slots[row]), 5)
        for head in range(queries + kv_heads):
            values = heads[row, head].clone()
            weight = weights[0] if head < queries else weights[1]
            if weight is not None:
                values = values / math.sqrt(float(values.square().mean()) + 1e-6) * weight.double()
            turned = values.clone()
            for i in range(rotated // 2):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotated // 2)
                angle = float(angles[positions[row], i])
                turned[a] = values[a] * math.cos(angle) - values[b] * math.sin(angle)
                turned[b] = values[b] * math.cos(angle) + values[a] * math.sin(angle)
            found = q[row, head] if head < queries else cache.k[page, head - queries, offset]
            torch.testing.assert_close(found.double(), turned, **rounding(dtype))
        assert torch.equal(cache.v[page, :, offset].double(), heads[row, queries + kv_heads :])
    assert cache.k.isnan().sum() == (15 - rows) * kv_heads * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_copy_pages(dtype: torch.dtype) -> None:
    pages = (noise(6, 2, 3, 4) * 50).to(dtype)
    before = pages.clone()
    ops.copy_pages(pages, torch.tensor([4, 4, 0]), torch.tensor([1, 5, 2]))
    for page, source in enumerate([0, 4, 0, 3, 4, 4]):
        assert torch.equal(pages[page], before[source])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_of(top: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, with chunks of three rows."""
    monkeypatch.setattr(ops, "LOGIT_ELEMENTS", 3 * 123 + 1)
    hidden, head = noise(11, 24, dtype=dtype), noise(123, 24, dtype=dtype, seed=1)
    targets = torch.arange(0, 121, 11)
    found = ops.logprobs_of(hidden, head, targets, top)
    assert found.values.dtype == torch.float32
    assert found.top_values.shape == found.top_ids.shape == (11, top)
    for row in range(11):
        logits = (hidden[row] @ head.T).double()  # rounded as a model's logits are
        exact = logits - math.log(sum(math.exp(v) for v in logits.tolist()))
        target = int(targets[row])
        tolerance = {"rtol": 1e-5, "atol": 1e-5 if dtype == torch.float32 else 0.1}
        torch.testing.assert_close(found.values[row].double(), exact[target], **tolerance)
        best = exact.sort(descending=True).values[:top]
        torch.testing.assert_close(found.top_values[row].double(), best, **tolerance)
        if dtype == torch.float32:
            assert int(found.ranks[row]) == 1 + sum(v > exact[target] for v in exact)


def test_token_logprobs() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    ids = torch.tensor([0, 3, 49, 7])
    found = ops.token_logprobs(logits, ids, 5)
    reference = logits.log_softmax(-1)
    torch.testing.assert_close(found.values, reference.gather(1, ids[:, None])[:, 0])
    assert found.ranks.tolist() == [1 + int((reference[i] > reference[i, token]).sum()) for i, token in enumerate(ids)]
    torch.testing.assert_close(found.top_values, reference.topk(5).values)
    assert torch.equal(found.top_ids, reference.topk(5).indices)
    assert ops.token_logprobs(logits, ids, 0).top_ids.shape == (4, 0)


def test_logprobs_at_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, across rounds; ranks and likely tokens stay, and a factor of 1 changes no bit."""
    monkeypatch.setattr(ops, "LOGIT_ELEMENTS", 3 * 50)
    hidden, head, targets = noise(7, 24), noise(50, 24, seed=1), torch.arange(7)
    factors = torch.tensor([1.0, 2.0, 0.5, 1.0, 10.0, 1 / 3, 1.0])
    plain, found = (ops.logprobs_of(hidden, head, targets, 4, given) for given in (None, factors))
    expected = ((hidden @ head.T).double() * factors[:, None]).log_softmax(-1)
    torch.testing.assert_close(found.values.double(), expected[torch.arange(7), targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.top_values.double(), expected.topk(4).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ranks, plain.ranks) and torch.equal(found.top_ids, plain.top_ids)
    ones = factors == 1
    assert torch.equal(found.values[ones], plain.values[ones])
    assert torch.equal(found.top_values[ones], plain.top_values[ones])


def test_rank_one_is_the_most_likely() -> None:
    head = torch.eye(3)
    found = ops.logprobs_of(torch.tensor([[0.0, 2.0, 1.0]]).expand(3, 3), head, torch.tensor([0, 1, 2]), 2)
    assert found.ranks.tolist() == [3, 1, 2]
    assert found.top_ids.tolist() == [[1, 2]] * 3


def test_more_likely_tokens_than_there_are() -> None:
    found = ops.logprobs_of(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 1]), 5)
    assert found.top_ids.shape == found.top_values.shape == (2, 3)


def test_an_operation_runs_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend's function of the same name takes the calls of its device type; what it lacks runs the body."""
    monkeypatch.setattr(dispatch, "BACKENDS", {"meta": ".sampling"})

    def body(x: Tensor) -> str:
        return "body"

    op = ops.op(body)
    assert op(torch.empty(1, device="meta")) == op(torch.empty(1)) == "body"
    monkeypatch.setattr("tandem.kernels.sampling.body", lambda x: "backend", raising=False)
    assert ops.op(body)(torch.empty(1, device="meta")) == "backend"
    assert ops.op(body)(torch.empty(1)) == "body"
