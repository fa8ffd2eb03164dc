"""How kernels are launched: sizes from tables and widths, never from measurements at start-up.

A kernel's block sizes stand in its own file, as a mapping from architecture (80, 89, 90, 100) to sizes by shape class;
`pick` takes the device's entry. `options` are what every launch passes on to Triton.

Triton compiles a kernel again for each type, constant and property of its arguments: a pointer or integer that is a
multiple of 16, an integer that is 1. Where such a property changes from step to step, a kernel names the argument in
`do_not_specialize` (counts) or `do_not_specialize_on_alignment` (parts of a staging buffer).

Compiled kernels stay on disk in Triton's own cache: `TRITON_CACHE_DIR`, by default ~/.triton/cache. Its keys hold the
source, the types, the constants, the architecture and Triton's version, so it may be shared between processes, kept
over upgrades, and deleted at any time. The container has it in a volume (Dockerfile.cuda): a kernel is compiled once
per image, not once per start; those of decodes when the engine records its first graph, before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch

Entry = TypeVar("Entry")

OLDEST = 80  # bfloat16, cp.async
INTERPRETED_AS = 90  # on the CPU there is only the interpreter, which stands for an H200 of few processors
INTERPRETED_PROCESSORS = 4
MAX_WARPS = 16


@cache
def architecture(device: torch.device) -> int:
    """10 · compute capability. 8.6 and 12.x count as 8.9: as little shared memory, and no `wgmma` either."""
    if device.type == "cpu":
        return INTERPRETED_AS
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; 8.0 is needed"
        )
    return 89 if (major, minor) == (8, 6) or major == 12 else 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, for grids that stay resident."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick(table: Mapping[int, Entry], device: torch.device) -> Entry:
    """The entry of the newest architecture in the table that is not newer than the device's."""
    here = architecture(device)
    return table[max(arch for arch in table if arch <= here)]


def warps(elements: int, per_thread: int = 16) -> int:
    """Warps for a program of `elements` (a power of two) that gives each thread about `per_thread`: 1 to 16.

    16 float16 values are two 16-byte loads in flight per thread.
    """
    return min(MAX_WARPS, max(1, elements // (32 * per_thread)))


def options(num_warps: int, num_stages: int = 1) -> dict[str, int | bool]:
    """Keyword arguments of a launch. Products and sums fuse to one rounding, whatever a Triton version's default is."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
