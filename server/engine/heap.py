"""The C library's heap, told to keep the memory that it has.

A step on a CPU makes and drops the same tensors over and over. By default glibc takes larger ones from the system and
gives them back, depending on what the process has freed before, so that a step pays for its memory again: a page fault,
and 4 KiB of zeros, per page. With 16 requests at a 125M LLaMA those were 240,000 in two seconds, and 6 to 20 % of the
time (benchmarks/results/cpu_heap.md).
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)
KEPT = (1 << 31) - 1  # bytes at the heap's end that are not given back
STEP = 64 << 20  # bytes by which it grows
LARGEST = 32 << 20  # bytes of what comes from the heap, the most that glibc allows; larger tensors are mapped as before


def keep_heap() -> bool:
    """From now on, in this process. False where the C library has no such setting; then nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, KEPT), (TOP_PAD, STEP))
    return all([bool(mallopt(name, value)) for name, value in settings])
