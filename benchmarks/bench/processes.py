"""CPU time and memory of a server's processes, from Linux's /proc. Nothing is attached to the server.

The kernel counts a process's run time exactly and shows it in ticks (of 10 ms, as a rule), so that a difference between
two looks is off by less than one tick per process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # per second
LISTEN = "0A"


@dataclass(frozen=True)
class Process:
    """One look. CPU seconds are user and system time of all threads, ended ones too."""

    pid: int
    name: str
    started: int  # ticks since boot: a pid that is used again is another process
    cpu_seconds: float
    reaped_seconds: float  # of its children that have ended
    peak_rss: int  # bytes, since the process began; pages shared with others count in each


@dataclass(frozen=True)
class Used:
    """What a process used between two looks."""

    pid: int
    name: str
    cpu_seconds: float
    peak_rss: int


def look(pid: int) -> Process | None:
    """None: there is no such process, or there no longer is."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()  # from the third field of proc(5) on
    user, system, reaped_user, reaped_system = (int(field) for field in fields[11:15])
    peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return Process(
        pid, name, int(fields[19]), (user + system) / TICKS, (reaped_user + reaped_system) / TICKS, peak * 1024
    )


def tree(root: int) -> dict[int, Process]:
    """A process and its descendants, by pid."""
    found: dict[int, Process] = {}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        process = look(pid)
        if process is None or pid in found:
            continue
        found[pid] = process
        waiting.extend(children(pid))
    return found


def children(pid: int) -> Iterator[int]:
    """Whatever thread started them."""
    for task in PROC.glob(f"{pid}/task/*/children"):
        try:
            yield from (int(child) for child in task.read_text().split())
        except OSError:
            continue


def used(before: dict[int, Process], after: dict[int, Process]) -> list[Used]:
    """By process, most first. What ended in between stands under the name "ended": its parent has its time."""
    found: list[Used] = []
    for pid, process in after.items():
        earlier = before.get(pid)
        already = earlier.cpu_seconds if earlier is not None and earlier.started == process.started else 0.0
        found.append(Used(pid, process.name, process.cpu_seconds - already, process.peak_rss))
    total = sum(one.cpu_seconds + one.reaped_seconds for one in after.values())
    total -= sum(one.cpu_seconds + one.reaped_seconds for one in before.values())
    ended = total - sum(one.cpu_seconds for one in found)
    if ended > 0.5 / TICKS:
        found.append(Used(0, "ended", ended, 0))
    return sorted(found, key=lambda one: -one.cpu_seconds)


def listener(url: str) -> int | None:
    """The process that serves this URL: the ancestor of all that hold a socket listening on its port.

    None where the host is not this machine, nobody listens, or /proc does not show us who.
    """
    parts = urlsplit(url)
    if not is_local(parts.hostname or ""):
        return None
    sockets = {f"socket:[{inode}]" for inode in _listening(parts.port or (443 if parts.scheme == "https" else 80))}
    owners = {pid for pid in _pids() if sockets and _holds(pid, sockets)}
    # Workers inherit the socket of the process that opened it.
    roots = [pid for pid in owners if not (set(_ancestors(pid)) & owners)]
    return min(roots) if roots else None


def is_local(host: str) -> bool:
    return host in ("localhost", "::1", "0.0.0.0", "::", socket.gethostname()) or host.startswith("127.")


def machine_seconds() -> float:
    """CPU seconds that the whole machine has spent working since boot, time taken by a hypervisor included."""
    fields = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS  # without idle and waiting for disks


def _listening(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def _holds(pid: int, sockets: set[str]) -> bool:
    try:
        return any(_target(descriptor) in sockets for descriptor in (PROC / str(pid) / "fd").iterdir())
    except OSError:  # another user's process, or it has ended
        return False


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            stat = (PROC / str(pid) / "stat").read_text()
        except OSError:
            return
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
        yield pid
