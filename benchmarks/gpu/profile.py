"""Where the device's time goes: kernels by name, and how long it had none to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType

LISTED = 16  # kernels by name, the longest


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds. `busy` is the time in which at least one kernel or copy ran."""

    span: float
    busy: float
    kernels: int
    by_name: dict[str, float]

    @property
    def idle(self) -> float:
        """Part of the span without any kernel."""
        return 1 - self.busy / self.span if self.span else 0.0


def profiler() -> torch.profiler.profile:
    """Records kernels and copies only: what the host does would cost it time."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)


def read(recorded: torch.profiler.profile) -> Profile:
    """What was recorded, from the first kernel's start to the last one's end."""
    events = [e for e in recorded.events() or [] if e.device_type == DeviceType.CUDA]
    times: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.time_range.end - event.time_range.start
    span, busy = covered((event.time_range.start, event.time_range.end) for event in events)
    longest = {name: 1e-6 * taken for name, taken in times.most_common(LISTED)}
    return Profile(1e-6 * span, 1e-6 * busy, len(events), longest)


def covered(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(from the first start to the last end, how much of it some interval covers)."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0, 0.0
    busy, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - ordered[0][0], busy
