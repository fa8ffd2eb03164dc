"""A fixed sequence of operations, recorded once and then replayed, its kernels' calls as one.

A decode of few rows takes some milliseconds, nearly all of it to read the matrices, which drive Python's own code and
objects out of the caches: around each kernel it then takes 20 µs, a quarter of the step in all. A recording calls the
same kernels with the same arguments. What PyTorch does between them is done again, too, into the same tensors; what it
only looks at differently costs nothing.
"""

# torch leaves the types of dispatch modes and operators open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .native import RECORDER, Native, Replay, ReplayStep, native

ALIGNED = 64  # bytes: a cache line
EMPTY = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})


class Memory:
    """Room for what recordings make on their way. Those that never run at the same time may share it."""

    def __init__(self, size: int) -> None:
        size = -(-size // ALIGNED) * ALIGNED
        whole = np.empty(size + ALIGNED, np.uint8)  # taken from the system as it is first written to
        begin = -whole.ctypes.data % ALIGNED
        self.data = whole[begin : begin + size]

    def alias(self, tensor: Any) -> Any:
        """A tensor that looks at the same place of the memory without using it; what lies elsewhere is itself."""
        if not isinstance(tensor, Tensor):
            return tensor
        begin = tensor.data_ptr() - self.data.ctypes.data
        if not 0 <= begin < len(self.data):
            return tensor
        whole = torch.from_numpy(self.data).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), begin // tensor.itemsize)


class Recording:
    """What `record` took down. `result`: what the work gave; its values are those of the newest replay, and good until
    the next one in the same memory."""

    def __init__(self, result: Tensor, parts: list[Callable[[], object]], calls: dict[str, int]) -> None:
        self.result, self._parts = result, parts
        self.calls = calls  # of each kernel

    def replay(self) -> Tensor:
        for part in self._parts:
            part()
        return self.result


def record(work: Callable[[], Tensor], memory: Memory) -> tuple[Tensor, Recording | None]:
    """Does the work, and records it; None where it does not fit the memory, or did what cannot be replayed.

    The work may read and write tensors that are there before and stay where they are. What it gives, and whatever else
    it makes, lies in `memory`. It must not look at values: those of a replay are others.
    """
    library = native()
    assert library is not None, "without the C++ kernels there is nothing to replay"
    recorder = _Recorder(memory, library)
    token = RECORDER.set(recorder.called)
    try:
        with recorder:
            result = work()
    finally:
        RECORDER.reset(token)
    return result, recorder.recording(result)


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks; if so, it would import its compiler at the first operation, which takes more than a second."""
        return False

    def __init__(self, memory: Memory, library: Native) -> None:
        super().__init__()
        self._memory, self._library = memory, library
        self._end = 0
        self._free: dict[int, list[int]] = {}  # begins of blocks that are used no more, by size
        self._calls: list[tuple[str, ctypes.Structure]] = []  # since the last part
        self._parts: list[Callable[[], object]] = []
        self._counts: dict[str, int] = {}
        self._refused = False

    def called(self, name: str, call: ctypes.Structure) -> None:
        self._calls.append((name, call))
        self._counts[name] = self._counts.get(name, 0) + 1

    def recording(self, result: Tensor) -> Recording | None:
        self._close()
        return None if self._refused else Recording(result, self._parts, self._counts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # what is made of other operations is recorded as these
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = func(*args, **kwargs)
        if func.is_view:
            return made
        if not isinstance(made, Tensor):
            self._refused = True
            return made
        if func._schema.name in EMPTY:
            return self._placed(made)
        self._close()
        alias = self._memory.alias
        again = partial(func, *tree_map(alias, args), **tree_map(alias, kwargs))
        if func._schema.is_mutable:
            self._parts.append(again)
            return made
        placed = self._placed(made).copy_(made)
        result = alias(placed)
        self._parts.append(lambda: result.copy_(again()))
        return placed

    def _close(self) -> None:
        """The calls so far are one part."""
        if self._calls:
            self._parts.append(partial(self._library.run, "tandem_replay", _replay(self._library, self._calls)))
            self._calls = []

    def _placed(self, like: Tensor) -> Tensor:
        """An empty tensor like this one in the memory; its place is used again once nothing looks at it any more."""
        size = -(-max(like.nbytes, 1) // ALIGNED) * ALIGNED
        free = self._free.setdefault(size, [])
        if not (free or self._end + size <= len(self._memory.data)) or not like.is_contiguous():
            self._refused = True
            return like
        if free:
            begin = free.pop()
        else:
            begin, self._end = self._end, self._end + size
        block: NDArray[np.uint8] = self._memory.data[begin : begin + size]
        finalize(block, free.append, begin).atexit = False
        return torch.from_numpy(block)[: like.nbytes].view(like.dtype).view(like.shape)


def _replay(library: Native, calls: list[tuple[str, ctypes.Structure]]) -> ctypes.Structure:
    steps = (ReplayStep * len(calls))()  # holds the arguments
    for step, (name, call) in zip(steps, calls, strict=True):
        step.function = ctypes.cast(getattr(library.library, name), ctypes.c_void_p)
        step.arguments = ctypes.addressof(call)
    replay = Replay(ctypes.addressof(steps), len(calls))
    replay.held = steps, calls
    return replay
