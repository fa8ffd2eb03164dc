"""A backend's function is the definition's in name and signature."""

from __future__ import annotations

import inspect

import pytest

import tandem.kernels.triton as backend
from tandem.kernels import ops, sampling

OVERRIDES = backend.__all__


@pytest.mark.parametrize("name", OVERRIDES)
def test_same_signature(name: str) -> None:
    definition = getattr(ops, name, None) or getattr(sampling, name)
    assert inspect.signature(getattr(backend, name)) == inspect.signature(definition)


def test_nothing_else_is_public() -> None:
    """`ops.op` finds overrides by name; a helper of the same name as an operation would become one."""
    public = {name for name, value in vars(backend).items() if inspect.isfunction(value)}
    assert public == set(OVERRIDES)
