"""Servers that a benchmark starts by itself, each with its processes: what these cost, and what they hold."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from .processes import children
from .servers import free_port


def cpu_seconds(pid: int) -> float:
    """Time that a process has spent on processors since its start, all threads that still live. Exact, not in ticks."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0])
        except OSError:  # it ended just now
            continue
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Anonymous memory of a process that is in RAM: what it allocated, without files it has mapped."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


class Served:
    """A command that serves HTTP. `with Served(command, ready) as server:` is ready inside."""

    def __init__(self, command: list[str], url: Callable[[str], str | None], seconds: float = 120.0) -> None:
        """`url` finds the address in what the command has said so far, once it serves."""
        self._command, self._find, self._seconds = command, url, seconds
        self._log = tempfile.NamedTemporaryFile("w+", prefix="tandem-bench-", suffix=".log")  # noqa: SIM115
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self._command, stdout=self._log, stderr=subprocess.STDOUT)
        end = time.monotonic() + self._seconds
        while not self.url:
            said = Path(self._log.name).read_text()
            self.url = self._find(said) or ""
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"{' '.join(self._command)} does not serve:\n{said}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def processes(self) -> dict[int, str]:
        """Names by process id: the one that was started, and those that it started."""
        own, started = self.process.pid, sorted(children(self.process.pid))
        names = {own: "supervisor" if started else name_of(own)}
        for pid in started:
            names[pid] = name_of(pid)
        return names

    def cpu(self) -> dict[str, float]:
        """Processor seconds so far, by name; processes of one name added up."""
        used: dict[str, float] = {}
        for pid, name in self.processes().items():
            used[name] = used.get(name, 0.0) + cpu_seconds(pid)
        return used


def tandem(*arguments: object) -> Served:
    """`tandem serve` with these arguments on a free port. Its processes are called tandem-api and tandem-engine."""
    command = [sys.executable, "-m", "tandem.server", "serve", "--port", "0", *map(str, arguments)]

    def find(said: str) -> str | None:
        found = re.search(r"^Serving on (http://\S+)", said, re.MULTILINE)
        return found and found[1]

    return Served(command, find)


def bare() -> Served:
    """`bare.py` on a free port."""
    port = free_port()

    def find(_: str) -> str | None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return None
        return f"http://127.0.0.1:{port}"

    return Served([sys.executable, "-m", "tandem.benchmarks.bench.bare", str(port)], find)
