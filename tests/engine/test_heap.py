"""Memory that a step makes and drops is there again for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys, torch
from tandem.server.engine.heap import MMAP_THRESHOLD, keep_heap
ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)  # where glibc begins, before it adapts itself to luck
torch.set_num_threads(1)
if sys.argv[1] == "kept" and not keep_heap():
    sys.exit("mallopt is missing")
def step():
    return [torch.ones(6 << 20) for _ in range(6)]  # of 24 MiB
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_steps_touch_no_fresh_memory() -> None:
    kept, fresh = faults("kept"), faults("as it is")
    assert kept < 100 and fresh >= 300, (kept, fresh)  # five times 144 MiB: 36,864 pages, or 72 huge ones
