"""Work of fixed shapes that is recorded once and replayed: CUDA graphs by number of rows.

A recording runs on the same tensors as the work itself, so whoever replays one has first written its inputs. Graphs of
one pool, of one kind of work or several, never run at the same time, and what they leave in the pool is good until the
next replay: results are copied out.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...kernels.sampling import DRAW, RESTRICT

Work = Callable[[int], None]  # the rows
Pool = Any  # of torch, without a public name
RECORDED = (DRAW, DRAW | RESTRICT)  # what draws may use and still be part of a recorded decode


class Kind(NamedTuple):
    """Of a recorded decode."""

    uses: int | None  # what its draws may use; None: it leaves logits
    grouped: bool  # rows share prefixes
    adapted: bool  # a row has an adapter


def recorded_uses(uses: int) -> int | None:
    """What the draws of a recorded decode may use that fits such rows; None: only its logits can be recorded."""
    return next((known for known in RECORDED if uses & ~known == 0), None)


def buckets(most: int) -> list[int]:
    """Numbers of rows that are recorded: 1, 2, 4, 8, then every 16 up to `most`, which is one of them."""
    return sorted({count for count in (1, 2, 4, 8, *range(16, most, 16)) if count < most} | {most})


def new_pool(device: torch.device) -> Pool | None:
    """Memory for graphs that one stream replays; None where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Graphs:
    """`work(rows)` by number of rows. The largest is recorded at once: it sets the size of the `pool`.

    Others follow in idle time, those first that were asked for; until then the next larger one is replayed. On devices
    without graphs the work itself runs, on the same number of rows as its recording would.
    """

    def __init__(self, work: Work, most: int, device: torch.device, pool: Pool | None) -> None:
        self._work = work
        self._device = device
        self._sizes = buckets(most)
        self._wanted: list[int] = []
        self._ready: list[int] = []  # sorted
        self._recorded: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = pool
        self._record(most)

    @property
    def most(self) -> int:
        return self._sizes[-1]

    @property
    def missing(self) -> int:
        """How many are not recorded yet."""
        return len(self._sizes) - len(self._ready)

    def rows_for(self, rows: int) -> int:
        """How many rows the replay for `rows` of them will have."""
        wanted = self._sizes[bisect_left(self._sizes, rows)]
        at = bisect_left(self._ready, wanted)
        if self._ready[at] != wanted and wanted not in self._wanted:
            self._wanted.append(wanted)
        return self._ready[at]

    def run(self, rows: int) -> None:
        """Replays what `rows_for` gave."""
        if self._pool is None:
            self._work(rows)
        else:
            self._recorded[rows].replay()

    def record_next(self) -> None:
        """Records one more, if any is missing. What the work reads is overwritten by its owner's reset."""
        if self.missing:
            rest = [size for size in self._sizes if size not in self._ready]
            asked = [size for size in self._wanted if size in rest]
            self._record(asked[0] if asked else rest[0])
            self._wanted = asked[1:]

    def _record(self, rows: int) -> None:
        if self._pool is not None:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):  # compiles kernels and fills library workspaces, which cannot be recorded
                self._work(rows)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = self._recorded[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._work(rows)
        self._ready = sorted([*self._ready, rows])
