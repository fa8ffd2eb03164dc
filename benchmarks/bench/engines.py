"""Engines by name, and how the process of each is started: the interpreter of its environment, its adapter script.

Tandem and transformers run in this environment; the others in `.venvs/peers/NAME`, made by
`python -m tandem.benchmarks.peers.setup NAME`. What an engine does with the options of `protocol` stands in its script.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...server.supervisor import LIBRARIES
from .protocol import Child

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks" / "peers"
VENVS = ROOT / ".venvs" / "peers"


class EngineError(ValueError):
    """An engine that is not known or not set up. The message says what would do."""


@dataclass(frozen=True)
class Engine:
    script: str
    own_venv: bool = True
    environment: Callable[[int], Mapping[str, str]] = lambda threads: {}  # by number of threads


def vllm_environment(threads: int) -> dict[str, str]:
    """One thread on each of the first processors that this process may use: vLLM's own choice leaves out what it takes
    for the second thread of a core."""
    processors = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "tandem": Engine("tandem_child.py", own_venv=False, environment=lambda threads: LIBRARIES),
        "transformers": Engine("transformers_child.py", own_venv=False),
        "vllm": Engine("vllm_child.py", environment=vllm_environment),
        "llama.cpp": Engine("llama_cpp_child.py"),
        "ctranslate2": Engine("ctranslate2_child.py"),
    }
)


def parse(words: str) -> list[str]:
    """`--engine tandem,vllm` -> names, each known and set up. Raises EngineError."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    if not names:
        raise EngineError(f"--engine names no engine: any of {', '.join(ENGINES)}")
    for name in names:
        interpreter(name)
    return names


def interpreter(name: str) -> Path:
    """Python of the engine's environment. Raises EngineError."""
    if name not in ENGINES:
        raise EngineError(f"there is no engine {name}; there are {', '.join(ENGINES)}")
    return peer_interpreter(name) if ENGINES[name].own_venv else Path(sys.executable)


def peer_interpreter(name: str) -> Path:
    """Python of the environment that `peers.setup` made. Raises EngineError where it did not."""
    python = VENVS / name / "bin" / "python"
    if not python.exists():
        raise EngineError(f"{name} is not set up here; run: python -m tandem.benchmarks.peers.setup {name}")
    return python


def environment(name: str, threads: int | None = None) -> dict[str, str]:
    """What an engine's processes are told by their environment; `threads` None: as many as this process has processors.

    Nothing is looked for on the network.
    """
    count = threads or len(os.sched_getaffinity(0))
    common = {"OMP_NUM_THREADS": str(count), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**common, **ENGINES[name].environment(count)}


def start(name: str, *, threads: int | None = None, timeout: float = 900.0) -> Child:
    """The engine's process, nothing loaded yet; give `load` the same `threads`. Raises EngineError, ChildError."""
    command = [str(interpreter(name)), str(PEERS / ENGINES[name].script)]
    return Child(name, command, environment(name, threads), timeout=timeout)
