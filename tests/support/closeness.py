"""Tensors for kernel tests that give away a wrong read or write, and how far a result may be from the exact one.

A case runs on `DEVICE`: on the CPU under Triton's interpreter (TRITON_INTERPRET=1), else on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

# bfloat16 on a device only: the interpreter truncates where a device rounds, and its `tl.dot` multiplies bit patterns.
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]
POISON = {torch.int8: 99}  # NaN where the dtype has one


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def poison(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else POISON[dtype]


def framed(x: Tensor, columns: int = 3) -> Tensor:
    """A copy of x [..., D] inside a larger tensor of poison: a row before, one behind, `columns` at the end of each."""
    rows = x.numel() // x.shape[-1]
    whole = torch.full((rows + 2, x.shape[-1] + columns), poison(x.dtype), dtype=x.dtype, device=x.device)
    view = whole[1:-1, : x.shape[-1]].unflatten(0, x.shape[:-1])
    return view.copy_(x)


def frame_is_whole(view: Tensor) -> bool:
    """Whether nothing was written around a `framed` tensor."""
    assert view._base is not None
    probe = view._base.clone()
    probe.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(poison(view.dtype))
    return bool((probe == POISON[view.dtype] if view.dtype in POISON else probe.isnan()).all())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN (the largest integer): an element that a kernel leaves out shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype, ulps: float = 1, magnitude: float = 1e-3) -> None:
    """`found` has this dtype and is within `ulps` units in the last place of `exact` (float64), element by element.

    A unit is eps · max(|exact|, `magnitude`): raise `magnitude` to the size of the terms where a sum can cancel.
    """
    assert found.dtype == dtype, f"{found.dtype}, not {dtype}"
    assert exact.dtype == torch.float64, "the reference is float64"
    assert found.shape == exact.shape, f"{tuple(found.shape)}, not {tuple(exact.shape)}"
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=magnitude)
    error = ((found.double() - exact).abs() / unit).nan_to_num(nan=torch.inf).flatten()
    if error.numel() and float(error.max()) > ulps:
        worst = int(error.argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape))
        pytest.fail(
            f"{int((error > ulps).sum())} of {error.numel()} elements are off by more than {ulps} ulps; the worst, at "
            f"{place}, is {float(found[place])} for {float(exact[place])}: {float(error[worst]):.3g} ulps"
        )


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """`ops.linear` in float64, rounded to x's dtype before the activation as it is."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    if activation is None:
        return y
    y = y.to(x.dtype).double()
    if activation == "silu_and_mul":
        gate, up = y.chunk(2, dim=-1)
        return gate * gate.sigmoid() * up
    return torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
