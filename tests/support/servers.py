"""A real `tandem serve` in its own process: started on a free port, stopped, and looked at from outside."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx


class Server:
    """`with Server(tmp_path, "policy=DIR", "--max-num-seqs", 4) as server:` is ready inside; `stop` ends it earlier.

    What it says on stdout and stderr lies in `log`. One engine thread, unless the arguments say otherwise.
    """

    def __init__(self, directory: Path, *arguments: object, ready_within: float = 60.0) -> None:
        self._output = directory / f"server-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "tandem.server", "serve", "--port", "0", "--threads", "1"]
        with self._output.open("w") as output:
            self.process = subprocess.Popen([*command, *map(str, arguments)], stdout=output, stderr=output)
        self._seconds = ready_within
        self.base_url = ""

    def __enter__(self) -> Server:
        try:
            eventually(self._settled, self._seconds)
            assert self.base_url, f"exited with {self.process.returncode}:\n{self.log}"
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self._output.read_text()

    @property
    def last_line(self) -> str:
        return self.log.rstrip().rpartition("\n")[2]

    def children(self, name: str = "tandem-") -> list[int]:
        """Process ids of the engine ("tandem-engine"), the API workers ("tandem-api"), or both."""
        return [child for child in child_processes(self.process.pid) if process_name(child).startswith(name)]

    def ready(self) -> tuple[int, str]:
        """Status and text of /ready."""
        answer = httpx.get(f"{self.base_url}/ready", timeout=30)
        return answer.status_code, answer.text

    def wait_ready(self, seconds: float = 60.0) -> None:
        eventually(lambda: self.ready()[0] == 200, seconds)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """The exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still there {seconds} s after signal {number}:\n{self.log}") from None

    def _settled(self) -> bool:
        """It serves, or it never will."""
        found = re.search(r"^Serving on (http://\S+)", self.log, re.MULTILINE)
        self.base_url = found[1] if found else ""
        return found is not None or self.process.poll() is not None


def eventually(look: Callable[[], object], seconds: float) -> None:
    """Wait until it is true; the assertion that fails otherwise says how long that was."""
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def child_processes(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
