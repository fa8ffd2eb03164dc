"""The child's side of `benchmarks/bench/protocol.py`: a loop over lines, and what every adapter measures with.

Adapters are plain scripts that run in an engine's own environment: this file and they import nothing of Tandem's and
nothing that is not in the standard library, but for the engine itself, inside `load`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol


class Adapter(Protocol):
    """What a script makes of its engine. The answers' keys stand in `protocol.Child`."""

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]: ...

    def generate(self, token_ids: list[list[int]], output_lens: list[int], seed: int) -> dict[str, Any]: ...

    def score(self, token_ids: list[list[int]]) -> dict[str, Any]: ...


def serve(adapter: Adapter) -> None:
    """Answers until stdin ends. Libraries print to stdout as they like: that is the log from here on.

    Between two requests the processes that the engine started are stopped: vLLM's engine core takes a third of a
    processor while it waits, which would be taken from the engine that is measured then.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        _signal_descendants(signal.SIGCONT)
        try:
            answer = {"ok": _answer(adapter, json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _signal_descendants(signal.SIGSTOP)
        print(json.dumps(answer), file=answers, flush=True)
    _signal_descendants(signal.SIGCONT)  # so that they can end


def _signal_descendants(number: signal.Signals) -> None:
    for pid in [*_descendants(os.getpid())]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _answer(adapter: Adapter, request: dict[str, Any]) -> dict[str, Any]:
    do = request.pop("do")
    call: Callable[..., dict[str, Any]] = {
        "load": adapter.load,
        "generate": adapter.generate,
        "score": adapter.score,
    }[do]
    return call(**request)


class Stopwatch:
    """Wall time and processor time of a `with` block, without what the answer costs to write."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.first: float | None = None
        self._began = 0.0

    def note_first(self) -> None:
        """Call at every token; the first call counts."""
        if self.first is None:
            self.first = time.perf_counter() - self._began

    @property
    def times(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    watch = Stopwatch()
    cpu = cpu_seconds()
    watch._began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - watch._began
    watch.cpu_seconds = cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Processor time of this process to the nanosecond, and of its living descendants to the kernel's tick (10 ms)."""
    return time.process_time() + sum(_ticks(pid) for pid in _descendants(os.getpid())) / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime, stime


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def ignored(options: Mapping[str, Any], *known: str) -> list[str]:
    """The options that were given and that the engine has no counterpart for."""
    return sorted(name for name, value in options.items() if name not in known and value not in (None, False))


def on_cpu(options: Mapping[str, Any]) -> None:
    """Raises ValueError where another device was asked for than the one that is set up here."""
    device = options.get("device") or "cpu"
    if device not in ("auto", "cpu"):
        raise ValueError(f"device {device}: this engine was set up for the CPU")


def answers(token_ids: list[list[int]], output_lens: list[int], watch: Stopwatch, computed: int) -> dict[str, Any]:
    """The answer to `generate`: what is beyond a length that was asked for is computed, but not counted."""
    wanted = [ids[:length] for ids, length in zip(token_ids, output_lens, strict=True)]
    return {
        **watch.times,
        "output_tokens": [len(ids) for ids in wanted],
        "computed_tokens": computed,
        "first_token_seconds": watch.first,
        "token_ids": wanted,
    }


def batches(lengths: list[int], size: int | None) -> list[list[int]]:
    """Indices in batches of at most `size`, in order, for engines that have no scheduler of their own."""
    order = list(range(len(lengths)))
    step = size or max(len(order), 1)
    return [order[start : start + step] for start in range(0, len(order), step)]
