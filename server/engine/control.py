"""What the supervisor and the processes it started tell each other, pickled over a socket pair that only they hold.

The first message to a child is its start order. The end of the channel means that the other side is gone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection

from .options import EngineOptions, ModelSpec
from .request import Normalization

PR_SET_PDEATHSIG = 1
ADAPTED = "LoRA adapter"  # how a change came that gives a model an adapter of its own


@dataclass(frozen=True, slots=True)
class ModelState:
    """How a model stands beside its weights; what `digest` is of are the files of its start."""

    name: str
    digest: str
    version: int = 0
    label: str = ""
    reward_mean: float = 0.0
    reward_std: float = 1.0
    reward_normalization: Normalization = "none"
    paused: bool = False
    adapters: tuple[tuple[str, str, str], ...] = ()  # (name, path, digest)


@dataclass(frozen=True, slots=True)
class Change:
    """Weights that were committed to the first of `models` and are shared by the others."""

    models: tuple[str, ...]
    partial: bool
    files: tuple[tuple[str, str], ...]  # (path, digest), as they were staged; none: they cannot be read again
    came: str  # how, in words


@dataclass(frozen=True, slots=True)
class Standing:
    """From the engine, whenever it changes: what another engine must come to in order to serve in its place. `changes`
    in their order, without those that later ones replace."""

    models: tuple[ModelState, ...]
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class StartEngine:
    directory: str  # the run directory: the link's sockets lie there
    epoch: int
    models: tuple[ModelSpec, ...]
    options: EngineOptions
    log_level: str
    standing: Standing | None  # of the engine before this one; None: there was none


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """To a worker: an engine process of that epoch exists; its catalog comes over the link."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """To a worker: the engine died, or cannot come back."""

    cause: str


@dataclass(frozen=True, slots=True)
class Drain:
    """To a worker: refuse new requests, finish the running ones for that long, exit."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """To the engine: exit."""


@dataclass(frozen=True, slots=True)
class HostedModel:
    """One line of the table that the supervisor prints."""

    name: str
    role: str
    architecture: str
    head: str  # what it is and how it is read; empty: a language model's
    shares: str  # the model whose weights it has; empty: it has its own
    dtype: str
    context: int
    weight_bytes: int
    kv_pages: int
    kv_tokens: int
    kv_bytes: int
    kv_most_tokens: int  # with the slabs that it may be lent
    digest: str


@dataclass(frozen=True, slots=True)
class Ready:
    """From a child: it serves. The engine says what, and how long the parts of its start took."""

    models: tuple[HostedModel, ...] = ()
    division: str = ""  # how the memory was divided, one sentence
    seconds: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Failed:
    """From a child, the last word: why it cannot serve. `lost`: the weights it ought to serve are gone."""

    cause: str
    lost: bool = False


def enter(name: str, descriptor: int, parent: int) -> Connection[object, object]:
    """First thing in a child: die with the supervisor, leave signals to it, open the channel."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    # A terminal or a service manager signals the whole group; the supervisor alone decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as comm:
        comm.write(f"tandem-{name}"[:15])
    return Connection(descriptor)


def log_to_stderr(process: str, level: str) -> None:
    """Lines like `12:00:01 engine WARNING tandem.server.engine.process: …`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def as_flags(text: str) -> str:
    """A message about options, with the flags that set them: `max_num_seqs` becomes `--max-num-seqs`."""
    names = "|".join(option.name for option in fields(EngineOptions) if "_" in option.name)
    return re.sub(rf"\b({names})\b(?!=)", lambda match: "--" + match[1].replace("_", "-"), text)
