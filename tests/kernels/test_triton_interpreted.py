"""Every file of tests/kernels/triton under Triton's interpreter, two child processes at a time.

The same cases run on a CUDA device with `pytest -m gpu`; without one they are listed as skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import interpreted
import pytest

FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
Runs = dict[Path, Future[tuple[bool, str]]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The files of the tests that were selected, all submitted at once."""
    params = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpreted.run, file) for file in FILES if {"interpreted_file": file} in params}


@pytest.mark.parametrize("interpreted_file", FILES, ids=lambda file: file.stem)
def test_under_the_interpreter(interpreted_file: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    passed, shown = runs[interpreted_file].result()
    if not passed:
        pytest.fail(f"under TRITON_INTERPRET=1:\n{shown}", pytrace=False)
    with capsys.disabled():
        print(f"\n{interpreted_file.stem}: {shown}", end="")


def test_a_failing_case_fails_its_file(tmp_path: Path) -> None:
    """The last line of a child that passed is shown; of one that failed or ran nothing, all it said."""
    file = tmp_path / "test_broken.py"
    file.write_text("def test_broken():\n    assert 1 == 2, 'the message'\n")
    passed, shown = interpreted.run(file)
    assert not passed and "the message" in shown
    file.write_text("import pytest\n\n@pytest.mark.skip\ndef test_skipped():\n    pass\n")
    assert not interpreted.run(file)[0]
    file.write_text("import os, signal\n\ndef test_crash():\n    os.kill(os.getpid(), signal.SIGSEGV)\n")
    passed, shown = interpreted.run(file)
    assert not passed and "SIGSEGV" in shown
