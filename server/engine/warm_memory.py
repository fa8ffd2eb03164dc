"""Memory that the system provides before it is first written to.

Pages of the KV cache are allocated, not cleared: the system provides each as the first keys are written to it, in the
middle of a step, and clears it. A virtual machine whose host must find the memory first takes 5 ms for 2 MiB, and 32
clients spent 4 % of their time so (benchmarks/results/cpu_heap.md). While nobody asks, it costs nothing.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE_PAGE = 2 << 20
AHEAD = 256 << 20  # bytes behind those in use: more is not taken from the machine before it is needed
POPULATE_WRITE = 23  # madvise(2), Linux 5.14: contents stay


class WarmMemory:
    def __init__(self, memory: Tensor, ahead: int = AHEAD) -> None:
        """`memory` [bytes] uint8, on the CPU; `ahead`: bytes behind those in use that may be provided."""
        self._memory = memory  # stays as long as its address is used
        self._begin, self._end = memory.data_ptr(), memory.data_ptr() + len(memory)
        self._ahead = ahead
        self._next = self._begin
        self._madvise = ctypes.CDLL(None).madvise

    def provide(self, used: int) -> bool:
        """Has one huge page more provided, at most `ahead` bytes behind the first `used`; whether others are left."""
        start = max(self._next, self._begin + used)
        limit = min(self._end, self._begin + used + self._ahead)
        if start >= limit:
            return False
        self._next = min(start // HUGE_PAGE * HUGE_PAGE + HUGE_PAGE, limit)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._madvise(ctypes.c_void_p(page), ctypes.c_size_t(self._next - page), POPULATE_WRITE):
            self._next = self._end  # an older system, or none left: the first write gets it as before
            return False
        return True
