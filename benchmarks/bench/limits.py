"""What this machine can do at most, measured in the same run, and how long a load takes at least by that.

The limit of a load is the time of an engine that loses nothing: it computes every prompt once, all of them together,
then decodes all sequences at once; a step takes as long as reading its bytes (every matrix and the head once, K and V
of every sequence) or as its operations, whichever is longer. No schedule of these requests is faster, so that the
shares of the limit that engines reach can be compared. Vectors, activations and written K and V are not counted (under
1 %).

Weights that fit the processor's caches are read faster than from memory: a tiny model may exceed this limit.

Letters: P tokens of a prompt, O of an answer, n answers to a prompt, V vocabulary, D model size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.config import ModelConfig
from ..gpu import limits as cuda
from ..gpu.clock import device_time, release
from ..gpu.rows import Report
from ..gpu.setting import Setting
from ..gpu.shapes import kv_bytes, matrix_elements

READ_BYTES = 512 << 20  # of the CPU's probe: more than its caches hold
SIZES = (1024, 2048)  # sides of the CPU's matrix products; the faster one counts


@dataclass(frozen=True)
class Limits:
    """Of one device, with the threads that the engine has, too."""

    read: float  # bytes per second
    rates: dict[torch.dtype, float]  # operations per second of a large matrix product

    def best(self, other: Limits) -> Limits:
        """Of two measurements of one device and the same dtypes."""
        rates = {dtype: max(rate, other.rates[dtype]) for dtype, rate in self.rates.items()}
        return Limits(max(self.read, other.read), rates)

    def as_json(self) -> dict[str, float]:
        rates = {f"{str(dtype).removeprefix('torch.')}_gflops": rate / 1e9 for dtype, rate in self.rates.items()}
        return {"read_gb_per_second": self.read / 1e9, **rates}


@dataclass(frozen=True)
class Asked:
    """One request of a load: `n` answers of `output` tokens to a prompt whose first `cached` tokens are known."""

    prompt: int
    output: int  # 0: scored, not continued
    n: int = 1
    cached: int = 0


@dataclass(frozen=True)
class Held:
    """A model as an engine holds it: the dtype that it computes in, those of its matrices and of its K and V."""

    config: ModelConfig
    dtype: torch.dtype
    matrices: torch.dtype | None = None  # None: dtype
    pages: torch.dtype | None = None  # None: dtype

    @property
    def weight_bytes(self) -> float:
        """Of all matrices and the head, once."""
        return (matrix_elements(self.config) + head_elements(self.config)) * (self.matrices or self.dtype).itemsize


def measure(device: torch.device | str, dtypes: Iterable[torch.dtype]) -> Limits:
    """On CUDA as the GPU suite measures them; on a CPU with torch's present number of threads. About two seconds."""
    device = torch.device(device)
    wanted = sorted(set(dtypes), key=str)
    if device.type == "cuda":
        report = Report("limits", None, "cuda")
        cuda.run(Setting(device, Path()), report)
        release(device)
        figures = {row.name: row.figure * 1e12 for row in report.rows if row.figure is not None}
        rates = {dtype: figures.get(str(dtype).removeprefix("torch.")) or _rate(device, dtype) for dtype in wanted}
        return Limits(figures["read"], rates)
    return Limits(_read(device), {dtype: _rate(device, dtype) for dtype in wanted})


def _read(device: torch.device) -> float:
    """Bytes per second of the fastest of several loops that do little but read."""
    data = torch.ones(READ_BYTES // 4, device=device)
    half = torch.ones(READ_BYTES // 2 // 4096, 4096, device=device, dtype=torch.float16)
    vector = torch.ones(1, 4096, device=device, dtype=torch.float16)
    readers: list[Callable[[], Tensor]] = [data.sum, lambda: F.linear(vector, half)]
    return READ_BYTES / min(device_time(reader, device).median for reader in readers)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / device_time(lambda a=a, b=b: F.linear(a, b), device).median)
    return best


def head_elements(config: ModelConfig) -> int:
    """V · D, for a reward model labels · D."""
    return (config.labels or config.vocab_size) * config.hidden_size


def prefill_flops(config: ModelConfig, load: Iterable[Asked]) -> float:
    """Two operations per element of a matrix and computed token, four per pair of a query and a key and element of a
    head, and the head for the last row of each prompt."""
    total = 0.0
    for asked in load:
        computed = asked.prompt - asked.cached
        pairs = (asked.prompt * (asked.prompt + 1) - asked.cached * (asked.cached + 1)) / 2
        total += 2 * matrix_elements(config) * computed + _per_pair(config) * pairs + 2 * head_elements(config)
    return total


def _per_pair(config: ModelConfig) -> int:
    return 4 * config.layers * config.heads * config.head_size


def least_seconds(held: Held, load: list[Asked], limits: Limits) -> float:
    """How long the load takes at least on a machine with these limits."""
    config, rate = held.config, limits.rates[held.dtype]
    rows = sum(asked.prompt - asked.cached for asked in load)
    total = max(held.weight_bytes / limits.read, prefill_flops(config, load) / rate)
    per_row = 2 * (matrix_elements(config) + head_elements(config))
    per_token = kv_bytes(config, held.pages or held.dtype)
    ordered = sorted(load, key=lambda asked: asked.output)
    first = 0  # of those that still decode
    known = sum(asked.prompt for asked in ordered)
    rows = sum(asked.n for asked in ordered)
    pairs = sum(asked.n * asked.prompt for asked in ordered)
    for step in range(1, ordered[-1].output if ordered else 0):  # the prompts' step gave every sequence its first token
        while ordered[first].output <= step:
            asked = ordered[first]
            known, rows, pairs = known - asked.prompt, rows - asked.n, pairs - asked.n * asked.prompt
            first += 1
        moved = held.weight_bytes + (known + rows * step) * per_token  # a prompt's K and V once for its answers
        operations = rows * per_row + _per_pair(config) * (pairs + rows * step)
        total += max(moved / limits.read, operations / rate)
    return total
