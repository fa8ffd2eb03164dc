"""Tests import `tandem` as a user would: where it is not installed (a bare CUDA machine), it is this checkout."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path

if find_spec("tandem") is None:
    package = types.ModuleType("tandem")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tandem"] = package
