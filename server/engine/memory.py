"""How much memory the KV caches get, and what of it each hosted model has for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .arena_layout import Layout, lay_out
from .options import EngineOptions, ModelSpec, OptionsError

CPU_PART = 0.25  # of the memory that is free once the weights are loaded ...
CPU_MOST = 4 << 30  # ... and no more than that: the machine is not the server's alone
FULL_SEQUENCES = 2  # more pages than this many times what all running sequences can fill are not taken


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, within the control group's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(min(int(fields["MemAvailable"].split()[0]) * 1024, group_memory(Path("/sys/fs/cgroup"))))


def group_memory(directory: Path) -> float:
    """Bytes that a control group (version 2 or 1) may still take; infinite where nothing limits it.

    Files that were only read, such as the checkpoints just loaded, count as used there, and yet give way.
    """
    for limit, used, stat, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most, taken, counts = ((directory / name).read_text() for name in (limit, used, stat))
        except OSError:
            continue
        if most.strip().isdigit():
            reclaimable = dict(line.split() for line in counts.splitlines()).get(files, 0)
            return max(0, int(most) - int(taken) + int(reclaimable))
    return math.inf


def kv_cache_bytes(options: EngineOptions, available: int) -> int:
    """Bytes for the KV caches of all models together. Raises OptionsError for more than `available`."""
    if options.kv_cache_memory_bytes is not None:
        if options.kv_cache_memory_bytes > available:
            raise OptionsError(
                f"kv_cache_memory_bytes is {options.kv_cache_memory_bytes:,}, but once the weights are loaded only "
                f"{available:,} bytes are free"
            )
        return options.kv_cache_memory_bytes
    return min(int(available * CPU_PART), CPU_MOST)


def shares(specs: Sequence[ModelSpec]) -> list[float]:
    """Each model's part of the memory: what it asks for, or an equal part of what is left by those that ask."""
    asked = [spec.kv_share for spec in specs if spec.kv_share is not None]
    rest = 1 - sum(asked)
    silent = len(specs) - len(asked)
    if any(not 0 < share <= 1 for share in asked) or rest < -1e-9 or (silent and rest <= 1e-9):
        given = ", ".join(f"{spec.name} {spec.kv_share:.0%}" for spec in specs if spec.kv_share is not None)
        raise OptionsError(f"kv shares ({given}) must be above 0 and leave something for each of {len(specs)} models")
    return [spec.kv_share if spec.kv_share is not None else rest / silent for spec in specs]


def divide_arena(
    specs: Sequence[ModelSpec], contexts: Sequence[int], page_bytes: Sequence[int], memory: int, options: EngineOptions
) -> Layout:
    """Every model gets its kv share for good; without one, what a request as long as its context needs, up to an equal
    part, and a page more: a group has the page within which its prompt ends twice. What is left they share. On CPUs no
    more is taken than can be useful.

    Raises OptionsError for a model that gets less than two pages.
    """
    own: list[int] = []
    useful = 0
    for spec, part, context, size in zip(specs, shares(specs), contexts, page_bytes, strict=True):
        longest = -(-context // options.page_size)  # pages of a sequence at full length
        most = FULL_SEQUENCES * options.max_num_seqs * longest
        useful += most * size
        given = int(memory * part)
        pages = given // size
        if pages < 2:
            raise OptionsError(
                f"the KV cache of model {spec.name} gets {given:,} bytes, less than two pages of {size:,}: "
                "raise kv_cache_memory_bytes or the model's kv share"
            )
        if options.device == "cpu":
            pages = min(pages, most)
        if spec.kv_share is None and len(specs) > 1:
            pages = min(pages, longest + 1)
        own.append(pages)
    return lay_out(min(memory, useful) if options.device == "cpu" else memory, page_bytes, own)
