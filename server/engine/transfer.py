"""A group of processes in which a trainer, its rank 0, broadcasts weights to the engine: torch.distributed by hand.

The group is none of torch's global ones, so that joining and leaving touch nothing else. Its keys in the trainer's
store are those that torch itself uses: without a name those of `init_process_group(init_method="tcp://…")`, with one
those of the group of that name which trainers make beside their own.
"""

# torch.distributed comes without complete annotations.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...model.errors import CheckpointError
from ...model.incoming import named_dtype
from ...model.stored import Stored
from .commands import InitTransfer, TensorSpec

Named = list[tuple[str, Stored]]


class TransferFailed(Exception):
    """The others did not come, went away, or sent nothing in time."""


class Transfer:
    """Everything blocks, up to the command's `seconds` at a time: call it in a thread. Raises TransferFailed."""

    def __init__(self, command: InitTransfer, device: torch.device) -> None:
        """Returns once all are there. NCCL receives on `device`."""
        self.command = command
        self.failed = False  # nothing comes any more: leave it, and join another
        self._timeout = timedelta(seconds=command.seconds)
        self._device = device if command.backend == "nccl" else torch.device("cpu")
        try:
            self._group = self._join()
        except RuntimeError as error:
            what = f"no group of {command.world_size} came together at {command.master_address}:{command.master_port}"
            raise TransferFailed(f"{what}: {_first(error)}") from error

    def _join(self) -> Any:
        order = self.command
        rank, size = order.rank_offset, order.world_size
        store: Any = dist.TCPStore(order.master_address, order.master_port, size, timeout=self._timeout)
        for prefix in (order.group or "default_pg", f"{order.group or 0}/", f"{self._device.type}/"):
            store = dist.PrefixStore(prefix, store)
        if order.backend == "gloo":
            return dist.ProcessGroupGloo(store, rank, size, self._timeout)
        torch.cuda.set_device(self._device)  # of this thread
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)

    def receive(self, specs: Sequence[TensorSpec], packed: bool, chunk_bytes: int) -> Iterator[Named]:
        """The tensors, a few at a time, in the order in which they are broadcast. See `UpdateWeights`."""
        for chunk in chunks(specs, chunk_bytes if packed else 0):
            if not packed:
                (spec,) = chunk
                yield [_stored(spec, self._broadcast(torch.empty(spec.shape, dtype=_dtype(spec), device=self._device)))]
                continue
            sizes = [math.prod(spec.shape) * _dtype(spec).itemsize for spec in chunk]
            whole = self._broadcast(torch.empty(sum(sizes), dtype=torch.uint8, device=self._device))
            parts = whole.split_with_sizes(sizes)
            yield [
                # cloned: a tensor may begin at a byte where its dtype cannot
                _stored(spec, part.clone().view(_dtype(spec)).view(spec.shape))
                for spec, part in zip(chunk, parts, strict=True)
            ]

    def _broadcast(self, into: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._group.broadcast([into], options).wait(self._timeout)
            return into.cpu()
        except RuntimeError as error:
            self.failed = True
            raise TransferFailed(f"the broadcast of {into.nbytes} bytes did not come: {_first(error)}") from error


def chunks(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Runs of tensors in order, each closed as soon as it has more than `limit` bytes."""
    chunk, size = list[TensorSpec](), 0
    for spec in specs:
        chunk.append(spec)
        size += math.prod(spec.shape) * _dtype(spec).itemsize
        if size > limit or not limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def check(specs: Sequence[TensorSpec]) -> None:
    """Raises CheckpointError for what could not even be received."""
    for spec in specs:
        if named_dtype(spec.dtype)[0] is None:
            raise CheckpointError(f"{spec.name} has the dtype {spec.dtype!r}, which torch does not know")
        if any(length < 0 for length in spec.shape):
            raise CheckpointError(f"{spec.name} has the shape {list(spec.shape)}")


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype, _ = named_dtype(spec.dtype)
    assert dtype is not None
    return dtype


def _stored(spec: TensorSpec, tensor: Tensor) -> tuple[str, Stored]:
    read: Callable[[], Tensor] = lambda: tensor  # noqa: E731
    return spec.name, Stored("the broadcast", spec.shape, named_dtype(spec.dtype)[1], read)


def _first(error: Exception) -> str:
    """The first line: torch puts C++ frames behind it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
