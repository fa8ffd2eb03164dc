"""Tests import `tandem` as a user would: where it is not installed (a bare CUDA machine), it is this checkout.

What needs a GPU says so when it is skipped.
"""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("tandem") is None:
    package = types.ModuleType("tandem")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tandem"] = package


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        for item in marked if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
