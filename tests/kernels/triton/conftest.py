"""Where the cases of this folder run: under Triton's interpreter, on a GPU, or nowhere, and then they say so."""

from __future__ import annotations

from pathlib import Path

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
