"""CPU time by process, and which process answers on a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
from servers import eventually

from tandem.benchmarks.bench import processes

BUSY = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"


def test_work_is_charged_to_the_process_that_did_it() -> None:
    busy = BUSY.format(0.4) + "time.sleep(60)"
    code = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {busy!r}]); print(flush=True)\n"
    code += "sys.stdin.readline(); child.kill(); child.wait(); print(flush=True); sys.stdin.readline()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None and parent.stdout is not None
    try:
        before = processes.tree(parent.pid)
        parent.stdout.readline()
        eventually(lambda: sum(one.cpu_seconds for one in processes.tree(parent.pid).values()) > 0.38, 20)
        after = processes.tree(parent.pid)
        (child,) = set(after) - {parent.pid}
        found = processes.used(before, after)
        assert found[0].pid == child and 0.3 < found[0].cpu_seconds < 0.8
        assert found[0].peak_rss > 1 << 20

        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
        ended = processes.used(before, processes.tree(parent.pid))
        assert {one.name for one in ended if one.pid != parent.pid} == {"ended"}
        assert sum(one.cpu_seconds for one in ended) >= sum(one.cpu_seconds for one in found) - 0.02
    finally:
        parent.kill()
        parent.communicate()


def test_an_idle_process_uses_nothing() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        before = processes.tree(child.pid)
        time.sleep(0.2)
        assert sum(one.cpu_seconds for one in processes.used(before, processes.tree(child.pid))) <= 0.02
    finally:
        child.kill()
        child.communicate()


def test_a_pid_that_is_used_again_is_another_process() -> None:
    old = processes.Process(5, "a", 100, 9.0, 0.0, 0)
    new = processes.Process(5, "b", 200, 1.0, 0.0, 0)
    assert processes.used({5: old}, {5: new})[0].cpu_seconds == 1.0


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_listener_is_found_by_its_port(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        try:
            listening.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listening.listen()
        port = listening.getsockname()[1]
        url = f"http://localhost:{port}"
        assert processes.listener(url) == os.getpid()
        # A child that has the socket, too, is a worker of the one that opened it.
        command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[listening.fileno()])
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert processes.listener(url) == os.getpid()
        finally:
            child.kill()
            child.communicate()
    assert processes.listener(url) is None


def test_another_machine_has_no_process_here() -> None:
    assert processes.listener("http://192.0.2.1:8000") is None
    assert processes.is_local("127.0.0.53") and not processes.is_local("example.org")


def test_the_machines_time_goes_on() -> None:
    began = processes.machine_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert processes.machine_seconds() - began > 0.2
