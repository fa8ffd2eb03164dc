"""Tensors that lie in the memory of another process's GPU, by CUDA's handles: plain integers and bytes, no pickle."""

# torch does not type how storages are shared.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...model.errors import CheckpointError
from ...model.incoming import named_dtype
from ...model.stored import Stored
from .commands import IpcTensor

MOST_HANDLE = 4096  # bytes


def from_cuda_ipc(tensors: Sequence[IpcTensor], found: int | None = None) -> list[tuple[str, Stored]]:
    """`found`: how many GPUs there are; None: torch is asked. Raises CheckpointError that names the tensor at fault."""
    count = torch.cuda.device_count() if found is None else found
    if not count:
        raise CheckpointError("cuda_ipc needs a GPU, and this engine finds none; use disk or shm")
    return [(tensor.name, _stored(tensor, count)) for tensor in tensors]


def _stored(tensor: IpcTensor, count: int) -> Stored:
    dtype, name = named_dtype(tensor.dtype)
    device, handle, size, offset, counter, place, event, _ = tensor.storage
    if dtype is None:
        raise CheckpointError(f"CUDA IPC: {tensor.name} has the dtype {tensor.dtype!r}, which torch does not know")
    if not 0 <= device < count:
        raise CheckpointError(f"CUDA IPC: {tensor.name} lies on GPU {device}; there are {count}")
    if not all(0 < len(part) <= MOST_HANDLE for part in (handle, counter, event)):
        raise CheckpointError(f"CUDA IPC: {tensor.name} has a handle that is empty or longer than {MOST_HANDLE} bytes")
    needed = (tensor.offset + math.prod(tensor.shape)) * dtype.itemsize
    if min((size, offset, place, tensor.offset, *tensor.shape)) < 0 or needed > size:
        raise CheckpointError(f"CUDA IPC: {tensor.name} {list(tensor.shape)} exceeds its storage of {size} bytes")
    return Stored("CUDA IPC", tensor.shape, name, partial(_mapped, tensor, dtype))


def _mapped(tensor: IpcTensor, dtype: torch.dtype) -> Tensor:
    try:
        storage = torch.UntypedStorage._new_shared_cuda(*tensor.storage)
    except RuntimeError as error:
        raise CheckpointError(f"CUDA IPC: the handle of {tensor.name} cannot be opened: {error}") from error
    strides = torch.empty(tensor.shape, device="meta").stride()
    whole = torch.empty(0, dtype=dtype, device=storage.device)
    return whole.set_(storage, tensor.offset, tensor.shape, strides)  # pyright: ignore[reportCallIssue]  (a storage)
