"""Where the cases of this folder run: under Triton's interpreter, on a GPU, or nowhere, and then they say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import INTERPRETED

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The interpreter's tensors are small; two threads per operation only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def products_without_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the interpreter's products do not depend on where in a tile a row stands, as on tensor cores.

    NumPy's BLAS adds rows up in an order that depends on their place (seen on an AMD EPYC). In float64, rounded once at
    the end, no order shows.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(self: object, a: Any, b: Any, d: Any, *precision: object) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64 if d.data.dtype.kind == "f" else d.data.dtype)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
