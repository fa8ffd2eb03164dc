"""Servers of several engines, started on a free port and stopped: what `bench serve` and `bench startup` compare.

    with start("vllm", checkpoint, threads=2) as server:
        server.base_url, server.model, server.pid, server.ready_seconds

A server is ready when its health check says 200 and one token has come back: some answer the first before they have
read the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .engines import PEERS, environment, peer_interpreter

LOG_TAIL = 3000  # characters of the log that an error cites
MODEL = "model"  # the name under which every server serves it, but for those that know it by its path alone


class ServerError(RuntimeError):
    """A server that cannot be started or never gets ready. The message names it and ends with its log."""


@dataclass(frozen=True)
class Recipe:
    """`command(python, model, port, threads)`; further arguments come behind it. `health` is a path of the server."""

    command: Callable[[Path, Path, int, int], list[str]]
    health: str
    named_by_path: bool = False


def tandem(python: Path, model: Path, port: int, threads: int) -> list[str]:
    place = ["--port", str(port), "--threads", str(threads)]
    return [str(python), "-m", "tandem.server", "serve", f"{MODEL}={model}", *place]


def vllm(python: Path, model: Path, port: int, threads: int) -> list[str]:
    """Without compilation, which takes minutes on a processor. Threads are set by the environment."""
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
    return [str(python.with_name("vllm")), "serve", str(model), *place, "--enforce-eager"]


def transformers(python: Path, model: Path, port: int, threads: int) -> list[str]:
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [str(python.with_name("transformers")), "serve", str(model), *place]


def llama_cpp(python: Path, model: Path, port: int, threads: int) -> list[str]:
    """llama-cpp-python's server, which answers one request after another."""
    place = ["--host", "127.0.0.1", "--port", str(port), "--model_alias", MODEL]
    count = ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_ctx", "2048"]
    return [str(python), "-m", "llama_cpp.server", "--model", str(gguf(python, model)), *place, *count]


def gguf(python: Path, model: Path) -> Path:
    """The checkpoint as a bf16 GGUF file, written by llama.cpp's own environment. Raises ServerError."""
    command = [str(python), str(PEERS / "gguf_file.py"), str(model), "--type", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ServerError(f"llama.cpp: the checkpoint cannot be written as GGUF:\n{done.stderr[-LOG_TAIL:]}")
    return Path(done.stdout.strip().rpartition("\n")[2])


SERVERS: Mapping[str, Recipe] = MappingProxyType(
    {
        "tandem": Recipe(tandem, "/ready"),
        "vllm": Recipe(vllm, "/health"),
        "transformers": Recipe(transformers, "/health", named_by_path=True),
        "llama.cpp": Recipe(llama_cpp, "/v1/models"),
    }
)


class Server:
    """A context manager; what it says on stdout and stderr is `log`. Raises ServerError from `__enter__`.

    `ready_seconds`: from starting the process until one token of a completion had come back; `health_seconds`: until
    its health check said 200.
    """

    def __init__(self, name: str, model: Path, threads: int, arguments: Sequence[str], timeout: float) -> None:
        recipe = SERVERS[name]
        port = free_port()
        self.name = name
        python = Path(sys.executable) if name == "tandem" else peer_interpreter(name)
        self.command = [*recipe.command(python, model, port, threads), *arguments]
        self.base_url = f"http://127.0.0.1:{port}"
        self.model = str(model) if recipe.named_by_path else MODEL
        self.ready_seconds = self.health_seconds = float("nan")
        self._health, self._timeout = recipe.health, timeout
        self._environment = {**os.environ, **environment(name, threads)}

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()  # closed by `__exit__`
        began = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )
        try:
            self._wait(self._healthy, began + self._timeout)
            self.health_seconds = time.monotonic() - began
            self._wait(self._answers, began + self._timeout)
            self.ready_seconds = time.monotonic() - began
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Asks it to end, and ends with it what it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), LOG_TAIL, max(size - LOG_TAIL, 0)).decode("utf-8", "replace").strip()

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended with status {self._process.returncode}; its log:\n{self.log}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready within {self._timeout:g} s; its log:\n{self.log}")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        return self._ask(self._health)[0] == 200

    def _answers(self) -> bool:
        """Whether a token came back; ServerError for a refusal that will not pass."""
        status, text = self._ask(
            "/v1/completions", {"model": self.model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        )
        if status not in (0, 200, 503):
            raise ServerError(f"{self.name} refuses a completion with status {status}: {text}; its log:\n{self.log}")
        return status == 200

    def _ask(self, path: str, body: dict[str, object] | None = None) -> tuple[int, str]:
        """Status and text; status 0 where there was no answer."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.base_url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=self._timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")
        except OSError:
            return 0, ""


def start(
    name: str, model: Path | str, *, threads: int | None = None, arguments: Sequence[str] = (), timeout: float = 600.0
) -> Server:
    """A server of `model` (a checkpoint's directory) to enter with `with`. `arguments`: the server's own, as words.

    Raises EngineError where the engine is not set up, ServerError for one that has no server.
    """
    if name not in SERVERS:
        raise ServerError(f"{name} has no server that is started here; there are {', '.join(SERVERS)}")
    return Server(name, Path(model), threads or len(os.sched_getaffinity(0)), arguments, timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
