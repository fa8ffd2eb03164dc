"""Every variant in tests/support/variants, compiled by two versions of Triton.

The installed one compiles for four architectures. The one that GPU images of torch 2.11 carry, which `make .venvs/aot`
fetches, compiles for an H200's only: all four would take the time of all other kernel tests together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import pytest
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
FILES = sorted(file.stem for file in aot.VARIANTS.glob("*.py"))
OLDER = ROOT / ".venvs/aot"
VERSIONS = {triton.__version__: (None, aot.ARCHS), "3.6.0": (OLDER, (90,))}
TIMEOUT = 600  # seconds for all variants by one version, on two busy cores with an empty cache
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Callable[[str], Rows]:
    """The rows of a version for the files of the tests that were selected, from one child process."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == test_variants.__name__:
            wanted.setdefault(item.callspec.params["version"], []).append(item.callspec.params["variants"])
    done: dict[str, Rows] = {}

    def rows(version: str) -> Rows:
        if version not in done:
            path, archs = VERSIONS[version]
            assert path is None or (path / "triton").is_dir(), f"no Triton {version}: run `make .venvs/aot`"
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            if path is not None:
                environment["PYTHONPATH"] = str(path)
            command = [sys.executable, "tests/support/aot.py", "--json", f"--archs={','.join(map(str, archs))}"]
            said = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=TIMEOUT, check=True, stdout=subprocess.PIPE
            )
            answer = json.loads(said.stdout)
            assert answer["triton"] == version
            done[version] = answer["rows"]
        return done[version]

    return rows


@pytest.mark.parametrize("variants", FILES)
@pytest.mark.parametrize("version", VERSIONS)
def test_variants(
    version: str, variants: str, compiled: Callable[[str], Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in compiled(version) if row["file"] == variants]
    assert rows
    with capsys.disabled():
        print(f"\nTriton {version}\n{aot.table(rows)}", end="")
    if wrong := aot.complaints(rows):
        pytest.fail("\n".join(wrong), pytrace=False)


@triton.jit
def _share_kernel(x, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    value = tl.load(place)
    tl.store(place, value / tl.sum(value, 0))


def test_what_is_promised_is_checked() -> None:
    """One warp cannot keep 16384 floats in registers, and divides them without matrices and asynchronous copies."""
    variant = aot.Variant(
        "share",
        _share_kernel,
        {"x": "*fp32"},
        {"BLOCK": 16384},
        ["x"],
        num_warps=1,
        sass=("LDG.128", "HMMA"),
        sass_on={80: ("LDGSTS",), 90: ("HGMMA",)},
        absent=("STG",),
    )
    found = aot.compile(variant, 90)
    assert found.count("LDG.128") == found.count("LDG.E.128") > 0 and found.count("LDG.64") == 0
    wrong = " / ".join(aot.problems(variant, 90, found))
    for part in ("bytes of stack, at most 0", "no HMMA", "no HGMMA", f"{found.count('STG')} STG"):
        assert part in wrong
    assert "LDG.128" not in wrong and "LDGSTS" not in wrong
    large = aot.Resources(255, 0, 0, 120000, {})
    assert aot.problems(aot.Variant("", None, {}), 89, large) == ["120000 bytes of shared memory, at most 101376"]
    assert aot.problems(aot.Variant("", None, {}), 90, large) == []


def test_a_variant_that_does_not_compile_is_named() -> None:
    with pytest.raises(AssertionError, match=r"share: \['x', 'y'\]"):
        aot.compile(aot.Variant("share", _share_kernel, {"y": "*fp32"}, {"BLOCK": 16}), 90)
