"""Engines side by side: Tandem in this process where it is alone, otherwise every engine in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...model.config import read_config
from ...model.load import choose_dtype, matrix_dtype
from ...model.quantization import SCHEMES
from ...server.engine.options import EngineOptions
from ...server.engine.request import Request, Role
from . import engines
from .limits import Held, Limits, measure
from .local import Answer, Counted, Local, Run, Tick, generate, score
from .models import UsageError, is_null, path_of, spec_of
from .processes import machine_seconds
from .protocol import Child

POLICY, REWARD = "policy", "reward"  # names of the models in this process
ALONE = ("tandem",)


@dataclass(frozen=True)
class Setup:
    """What is measured, and how often."""

    model: str  # as --model says it
    options: EngineOptions
    dtype: str = "auto"  # or, of SCHEMES, in what each engine shall have its matrices
    engines: tuple[str, ...] = ALONE
    reward: str | None = None  # a reward model that scores every answer beside it
    runs: int = 3
    warmups: int = 1
    kv_cache_dtype: str = "auto"  # Tandem's

    @property
    def precision(self) -> dict[str, str]:
        """As a `ModelSpec` has it."""
        scheme = {"quantization": self.dtype} if self.dtype in SCHEMES else {"dtype": self.dtype}
        return scheme | {"kv_dtype": self.kv_cache_dtype}

    @property
    def alone(self) -> bool:
        return self.engines == ALONE

    @property
    def device(self) -> str:
        """Where Tandem computes: cpu, cuda or cuda:N."""
        given = self.options.device
        return given if given != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sample:
    """One run of one engine. Seconds count from when the requests were handed over."""

    seconds: float
    cpu_seconds: float  # of the engine's process and its children, all threads
    output_tokens: int
    firsts: list[float] = field(default_factory=list[float])  # first token of each request, as far as the engine tells
    between: list[float] = field(default_factory=list[float])  # time per output token after the first, of each request
    counted: dict[str, Counted] = field(default_factory=dict[str, Counted])  # by model, in this process alone
    steps: int | None = None
    others: float = 0.0  # CPU seconds that the rest of the machine used meanwhile


class Watch:
    """Tells, from when it is made, what processor time was none of the measured engine's."""

    def __init__(self) -> None:
        self._machine = machine_seconds()

    def others(self, own: float) -> float:
        """Seconds, to the kernel's tick (10 ms); `own` are the engine's."""
        return max(machine_seconds() - self._machine - own, 0.0)


class Side(Protocol):
    """`told`: what the engine says of itself: versions, dtype, threads, …"""

    told: dict[str, Any]

    def generate(
        self, token_ids: Sequence[list[int]], output_lens: Sequence[int], *, n: int = 1, tick: Tick | None = None
    ) -> Sample: ...


class LocalSide:
    def __init__(self, local: Local, reward: bool = False) -> None:
        card = local.engine(POLICY).card
        self.local, self._reward = local, reward
        self.told: dict[str, Any] = {"dtype": card.precision, "threads": torch.get_num_threads()}

    def generate(
        self, token_ids: Sequence[list[int]], output_lens: Sequence[int], *, n: int = 1, tick: Tick | None = None
    ) -> Sample:
        self.local.forget()
        pairs = zip(token_ids, output_lens, strict=True)
        requests = [generate(number, POLICY, ids, length, n=n) for number, (ids, length) in enumerate(pairs)]
        run = self.local.run(requests, self._judge(len(requests)) if self._reward else None, tick)
        return sample_of(run, [run.answers[request.id] for request in requests], n)

    @staticmethod
    def _judge(count: int) -> Any:
        """Asks for the reward of every answer, prompt before it, as soon as it is there."""
        numbers = iter(range(count, 1 << 62))

        def follow(request: Request, answer: Answer) -> list[Request]:
            if request.model == REWARD:
                return []
            return [score(next(numbers), REWARD, request.token_ids + ids) for ids in answer.token_ids.values()]

        return follow


def sample_of(run: Run, answers: Sequence[Answer], n: int) -> Sample:
    firsts = [answer.first - answer.asked for answer in answers if answer.first is not None]
    between = [
        (answer.end - answer.first) / (answer.tokens / n - 1)
        for answer in answers
        if answer.first is not None and answer.tokens > n
    ]
    tokens = sum(answer.tokens for answer in answers)
    return Sample(run.seconds, run.cpu_seconds, tokens, firsts, between, run.counted, run.steps)


class ChildSide:
    def __init__(self, child: Child, told: dict[str, Any]) -> None:
        self._child, self.told = child, told

    def generate(
        self, token_ids: Sequence[list[int]], output_lens: Sequence[int], *, n: int = 1, tick: Tick | None = None
    ) -> Sample:
        if n != 1:
            raise UsageError("--n above 1 is for --engine tandem alone: the other engines are asked for one answer")
        found = self._child.generate(token_ids, output_lens)
        first = found["first_token_seconds"]
        if tick is not None:
            tick(len(token_ids))
        tokens = sum(found["output_tokens"])
        return Sample(found["seconds"], found["cpu_seconds"], tokens, [] if first is None else [first])


@contextmanager
def opened(setup: Setup) -> Iterator[Mapping[str, Side]]:
    """The engines, loaded. Raises UsageError, engines.EngineError, ChildError, OptionsError, CheckpointError."""
    if setup.alone:
        specs = [spec_of(setup.model, POLICY, **setup.precision)]
        if setup.reward is not None:
            specs.append(spec_of(setup.reward, REWARD, "reward", **setup.precision))
        yield {"tandem": LocalSide(Local(specs, setup.options), setup.reward is not None)}
        return
    if setup.reward is not None:
        raise UsageError("--reward is for --engine tandem alone: no other engine hosts two models")
    path = path_of(setup.model)
    if is_null(path):
        raise UsageError(f"--model {setup.model} is for --engine tandem alone: no other engine has a free step")
    options = child_options(setup)
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in setup.engines:
            child = stack.enter_context(engines.start(name, threads=setup.options.threads))
            sides[name] = ChildSide(child, child.load(path, options))
        yield sides


def child_options(setup: Setup) -> dict[str, Any]:
    given = setup.options
    return {
        "dtype": setup.dtype,
        "kv_cache_dtype": None if setup.kv_cache_dtype == "auto" else setup.kv_cache_dtype,
        "threads": given.threads,
        "max_model_len": given.max_model_len,
        "max_num_seqs": given.max_num_seqs,
        "max_num_batched_tokens": given.max_num_batched_tokens,
        "enable_prefix_caching": given.enable_prefix_caching,
        "deterministic": given.deterministic,
        "device": given.device,
        "kv_cache_memory_bytes": given.kv_cache_memory_bytes,
    }


def held_of(setup: Setup, role: Role = "policy") -> Held | None:
    """The model as Tandem holds it, whatever engines are measured; None for one whose step is free."""
    path = path_of(setup.model, role)
    if is_null(path):
        return None
    config = read_config(path)
    device = torch.device(setup.device)
    scheme = setup.dtype in SCHEMES
    dtype = choose_dtype("auto" if scheme else setup.dtype, config, device)  # type: ignore[arg-type]
    pages = None if setup.kv_cache_dtype == "auto" else getattr(torch, setup.kv_cache_dtype)
    return Held(config, dtype, torch.int8 if scheme else matrix_dtype(dtype, config, device), pages)


class LimitsOf:
    """The limits of the run: measured before it and, on a CPU, which others may use meanwhile, after it again.

    The better figure of both counts. On CUDA there is room for the probes only before the engine takes the memory.
    """

    def __init__(self, setup: Setup, held: Held | None) -> None:
        if setup.options.threads is not None:
            torch.set_num_threads(setup.options.threads)
        self._device, self._held = setup.device, held
        self._before = self._measure()

    def _measure(self) -> Limits | None:
        return None if self._held is None else measure(self._device, [self._held.dtype])

    def after(self) -> Limits | None:
        """None for a model whose step is free."""
        if self._before is None or self._device != "cpu":
            return self._before
        again = self._measure()
        return self._before if again is None else self._before.best(again)
