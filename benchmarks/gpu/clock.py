"""Clocks: the device's time for kernels, the wall's for steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from .timing import Timing, timing_of

FLUSH_BYTES = 256 << 20  # written before every sample: several times the 50 MiB of L2
SAMPLES, LEAST = 40, 5
PATIENCE = 0.15  # seconds of samples per measurement, once there are LEAST


def device_time(
    call: Callable[[], object], device: torch.device, *, samples: int = SAMPLES, graph: bool = True, tiny: bool = False
) -> Timing:
    """One call, with the L2 cache flushed before it.

    On CUDA a graph of the call is replayed between two events, as the engine replays its decode steps, so that a
    launch's time on the host does not show; what cannot be captured is called itself.
    """
    if device.type != "cuda":
        return _host_time(call, samples=LEAST if tiny else samples)
    replay, captured = (capture(call), True) if graph else (None, False)
    if replay is None:
        replay, captured = call, False
    for _ in range(3):
        replay()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    torch.cuda.synchronize(device)
    began, taken = time.perf_counter(), 0
    for start, end in pairs:
        flush.zero_()
        start.record()
        replay()
        end.record()
        taken += 1
        if taken >= LEAST and time.perf_counter() - began > PATIENCE:
            break
    torch.cuda.synchronize(device)
    return timing_of([start.elapsed_time(end) / 1000 for start, end in pairs[:taken]], captured)


def capture(call: Callable[[], object]) -> Callable[[], object] | None:
    """A replay of the call's kernels; None where it cannot be captured (it waits for the device, say)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # outputs live as long as the graph writes to them
    try:
        with torch.cuda.graph(graph):
            kept.append(call())
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _host_time(call: Callable[[], object], samples: int) -> Timing:
    call()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < samples:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= LEAST and time.perf_counter() - began > PATIENCE:
            break
    return timing_of(seconds)


def wall_time(call: Callable[[], object], device: torch.device, *, samples: int = LEAST, warm: int = 1) -> Timing:
    """The clock's time from calling until the device has done everything."""
    for _ in range(warm):
        call()
    seconds: list[float] = []
    for _ in range(samples):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return timing_of(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back what the last case held, so that the next one has the whole device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
