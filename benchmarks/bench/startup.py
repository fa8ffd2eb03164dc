"""`tandem bench startup`: from starting the process until the first token of a chat answer, and the first reward.

Each run starts `tandem serve` afresh, asks for one streamed chat answer as soon as a connection is taken, and stops
the server. Beside it, in the same run: `import torch` in a fresh interpreter, which no server of this kind can beat,
and where they are asked for, servers of other engines (`servers.py`), until their first token. Prints a table and, as
the last line of the module's own command, one JSON document.

Warm is what a restart meets: files in the page cache, Python's bytecode compiled. Cold is what one process without
privileges can undo of that: the bytecode goes to an empty directory, so that every module is compiled again, and the
kernel is asked to forget the files of torch and of the checkpoints, which it does but for those that another process
has mapped. The disk's own cache and the libraries of the system stay warm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from ...server.options import bundled_models
from . import servers
from .stats import interleaved, ratio

TANDEM, TORCH = "tandem", "import torch"
GOAL = 1.5  # seconds from `import torch` of the same run to the demo model's first token


@dataclass(frozen=True)
class Start:
    """Seconds since the process was started."""

    accepts: float  # the port takes connections
    ready: float  # /ready says 200
    first_token: float
    done: float  # the whole answer has arrived
    first_reward: float | None  # None: no reward model is served


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], client: httpx.Client, path: str, deadline: float) -> None:
    """Ask `path` until it answers 200. Raises TimeoutError at `deadline` (time.monotonic), or once the server ended."""
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.01)
    raise TimeoutError(f"{path} did not answer 200 in time")


def first_token(client: httpx.Client, chat: bool = True) -> tuple[float, float]:
    """time.monotonic() of the first piece of text and of the end of one streamed answer.

    Not every checkpoint has a chat template, and the text of random weights may be empty: of a completion the first
    event counts, which is a token in any case.
    """
    path, given = "/v1/completions", {"prompt": "What is 17 + 25?", "max_tokens": 16}
    if chat:
        path, given = "/v1/chat/completions", {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    first = 0.0
    with client.stream("POST", path, json={**given, "stream": True, "temperature": 0}) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if not first and any(not chat or choice["delta"].get("content") for choice in choices):
                first = time.monotonic()
    if not first:
        raise RuntimeError("the stream ended without a token")
    return first, time.monotonic()


def measure(
    arguments: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None, chat: bool = True
) -> Start:
    port = free_port()
    command = [sys.executable, "-m", "tandem.server", "serve", "--port", str(port), *arguments]
    given = {**os.environ, **(environment or {})}
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=given)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client:
            deadline = began + timeout
            wait_for(server, client, "/version", deadline)
            accepts = time.monotonic()
            wait_for(server, client, "/ready", deadline)
            ready = time.monotonic()
            first, done = first_token(client, chat)
            models = client.get("/v1/models").json()["data"]
            reward = next((model["id"] for model in models if model.get("role") == "reward"), None)
            rewarded = None
            if reward is not None:
                client.post("/v1/rewards", json={"model": reward, "input": "What is 17 + 25? 12"}).raise_for_status()
                rewarded = time.monotonic()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    moments = (accepts - began, ready - began, first - began, done - began)
    return Start(*moments, None if rewarded is None else rewarded - began)


def import_torch(environment: Mapping[str, str] | None = None) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env={**os.environ, **(environment or {})})
    return time.monotonic() - began


@contextmanager
def cold(directories: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Forgets the files in there; yields what a process's environment must say for its bytecode to be new, too."""
    for directory in directories:
        for file in directory.rglob("*"):
            if file.is_file() and file.suffix in (".so", ".safetensors", ".json", ".py"):
                forget(file)
    with tempfile.TemporaryDirectory() as bytecode:
        yield {"PYTHONPYCACHEPREFIX": bytecode}


def directory_of(package: str) -> list[Path]:
    """Empty where it is not installed."""
    spec = find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []


def forget(file: Path) -> None:
    """Asks the kernel to drop the file's pages from memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run(
    arguments: Sequence[str],
    *,
    runs: int,
    cold_runs: int = 0,
    warmups: int = 0,
    peers: Sequence[str] = (),
    model: Path | None = None,
    threads: int | None = None,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """The result as JSON. `arguments` are `tandem serve`'s; `peers` serve `model`, until their first token."""
    colds: list[Start] = []
    cold_imports: list[float] = []
    read = [*directory_of("torch"), *([model] if model else [Path(spec.path) for spec in bundled_models()])]
    for _ in range(cold_runs):
        with cold(read) as environment:
            cold_imports.append(import_torch(environment))
        with cold(read) as environment:
            colds.append(measure(arguments, timeout, environment, model is None))
    sides: dict[str, Callable[[int], Any]] = {
        TORCH: lambda number: import_torch(),
        TANDEM: lambda number: measure(arguments, timeout, chat=model is None),
    }
    for name in peers:
        if model is None:
            raise ValueError(f"{name} needs --model: the directory of a checkpoint")
        sides[name] = lambda number, name=name: peer(name, model, threads, timeout)
    found = interleaved(sides, runs, warmups)
    starts: list[Start] = found[TANDEM]
    imports: list[float] = found[TORCH]
    medians = medians_of(starts)
    torch_seconds = statistics.median(imports)
    return {
        "benchmark": "startup",
        "runs": runs,
        "medians": medians,
        "import_torch": torch_seconds,
        "first_token_after_import_torch": medians["first_token"] - torch_seconds,
        "starts": [asdict(start) for start in starts],
        "imports": imports,
        "cold": {"medians": medians_of(colds), "import_torch": statistics.median(cold_imports)} if colds else None,
        "peers": {name: [asdict(one) for one in found[name]] for name in peers},
        "sooner": {name: sooner(starts, found[name]) for name in peers},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "serve": list(arguments),
    }


@dataclass(frozen=True)
class PeerStart:
    """Seconds since the process was started."""

    ready: float  # its health check says 200
    first_token: float  # of a completion


def peer(name: str, model: Path, threads: int | None, timeout: float) -> PeerStart:
    with servers.start(name, model, threads=threads, timeout=timeout) as server:
        return PeerStart(server.health_seconds, server.ready_seconds)


def sooner(starts: Sequence[Start], theirs: Sequence[PeerStart]) -> dict[str, Any]:
    """How many times as long the peer takes, by rounds."""
    return {
        name: asdict(ratio([asdict(one)[name] for one in theirs], [asdict(one)[name] for one in starts]))
        for name in ("ready", "first_token")
    }


def medians_of(starts: Sequence[Start]) -> dict[str, float]:
    """What every start has."""
    columns = {name: [asdict(start)[name] for start in starts] for name in (asdict(starts[0]) if starts else ())}
    return {name: statistics.median(values) for name, values in columns.items() if None not in values}


def lines(found: dict[str, Any]) -> list[str]:
    shown = [f"{'seconds from process start':28}{'median':>8}{'min':>8}{'max':>8}   ({found['runs']} runs)"]

    def add(name: str, values: Sequence[float]) -> None:
        shown.append(f"{name:28}{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}")

    for name in found["medians"]:
        add(name, [start[name] for start in found["starts"]])
    add("import torch (same run)", found["imports"])
    difference = found["first_token_after_import_torch"]
    goal = "" if found["serve"] else f"   (goal: at most {GOAL:.1f})"  # it is set for the bundled models
    shown.append(f"{'first_token - import torch':28}{difference:8.2f}{goal}")
    if found["cold"] is not None:
        for name, value in found["cold"]["medians"].items():
            shown.append(f"{'cold ' + name:28}{value:8.2f}")
        shown.append(f"{'cold import torch':28}{found['cold']['import_torch']:8.2f}")
    for name, theirs in found["peers"].items():
        for moment, value in found["sooner"][name].items():
            add(f"{name} {moment}", [one[moment] for one in theirs])
            shown[-1] += f"   {value['median']:.1f} times as long as Tandem [{value['low']:.1f}, {value['high']:.1f}]"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", type=int, default=0, help="starts with nothing in the caches, before the others")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a start may take")
    parser.add_argument("serve", nargs="*", help="arguments for `tandem serve`; none: the bundled models")
    options = parser.parse_args()
    found = run(options.serve, runs=options.runs, cold_runs=options.cold, timeout=options.timeout)
    print("\n".join(lines(found)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
