"""Kernel tests on the CPU: one child process per test file, with Triton's interpreter in place of its compiler.

`triton.jit` decides at import which of the two it is, so the process that runs the other tests cannot do it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds for one file


def run(file: Path) -> tuple[bool, str]:
    """(whether every case of `file` that needs no GPU ran and passed, what to show if not and its last line if so)."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=TIMEOUT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        shown = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return False, f"{shown}\n{file.name}: not done after {TIMEOUT} s under the interpreter"
    last = child.stdout.rstrip().rpartition("\n")[2].strip("= ")
    if child.returncode < 0:
        died = signal.Signals(-child.returncode).name
        return False, f"{child.stdout}\n{file.name}: {died}, an address outside of every tensor, most likely"
    return child.returncode == 0 and " passed" in last, last if child.returncode == 0 else child.stdout
