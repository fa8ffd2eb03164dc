"""How long from starting the process until the first token of a chat answer, and until the first reward.

Each run starts `tandem serve` afresh, asks for one streamed chat answer as soon as a connection is taken, and stops
the server. Beside it, in the same run: `import torch` in a fresh interpreter, which no server of this kind can beat.
Prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import httpx


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


def first_token(client: httpx.Client) -> tuple[float, float]:
    """time.monotonic() of the first piece of text and of the end of one streamed chat answer."""
    body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "stream": True, "temperature": 0}
    first = 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.monotonic()
    if not first:
        raise RuntimeError("the stream ended without a token")
    return first, time.monotonic()


def measure(arguments: list[str], timeout: float) -> Start:
    port = free_port()
    command = [sys.executable, "-m", "tandem.server", "serve", "--port", str(port), *arguments]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client:
            deadline = began + timeout
            wait_for(server, client, "/version", deadline)
            accepts = time.monotonic()
            wait_for(server, client, "/ready", deadline)
            ready = time.monotonic()
            first, done = first_token(client)
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


def import_torch() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a start may take")
    parser.add_argument("serve", nargs="*", help="arguments for `tandem serve`; none: the bundled models")
    options = parser.parse_args()

    starts: list[Start] = []
    imports: list[float] = []
    for _ in range(options.runs):
        imports.append(import_torch())
        starts.append(measure(options.serve, options.timeout))
    seconds = {name: [asdict(start)[name] for start in starts] for name in asdict(starts[0])}
    medians = {name: statistics.median(values) for name, values in seconds.items() if None not in values}
    print(f"{'seconds from process start':28}{'median':>8}{'min':>8}{'max':>8}   ({options.runs} runs)")
    for name, median in medians.items():
        print(f"{name:28}{median:8.2f}{min(seconds[name]):8.2f}{max(seconds[name]):8.2f}")
    print(f"{'import torch (same run)':28}{statistics.median(imports):8.2f}{min(imports):8.2f}{max(imports):8.2f}")
    result = {
        "benchmark": "startup",
        "runs": options.runs,
        "medians": medians,
        "import_torch": statistics.median(imports),
        "starts": [asdict(start) for start in starts],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "serve": options.serve,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
