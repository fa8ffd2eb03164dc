"""Where the tensors of an update lie: checkpoint files and shared memory.

Safetensors are read here, not mapped as at a start: whoever wrote the bytes may write them again meanwhile, and a
mapped file that shrinks ends the process.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .checkpoint import head_files
from .errors import CheckpointError
from .stored import DTYPES, INTEGERS, Stored, digest, open_file, weight_files

MOST_HEADER = 100_000_000  # bytes; safetensors' own bound
SHARED_MEMORY = Path("/dev/shm")


class Incoming(NamedTuple):
    """`files` with their `digest`, empty where they are none that can be read again."""

    tensors: list[tuple[str, Stored]]
    digest: str = ""


def from_disk(path: str, head: bool = False) -> Incoming:
    """A checkpoint directory, with or without config.json, or one of its files. `head`: with what a file beside the
    decoder's holds. Raises CheckpointError."""
    files = [*_files(path), *(head_files(Path(path)) if head else ())]
    if wrong := [file.name for file in files if file.suffix not in (".safetensors", ".bin")]:
        raise CheckpointError(f"{path}: {wrong[0]} is neither a .safetensors nor a .bin file")
    tensors = [
        named
        for file in files
        for named in (read_safetensors(file) if file.suffix == ".safetensors" else open_file(file)).items()
    ]
    return Incoming(tensors, digest_of(path))


def digest_of(path: str) -> str:
    """Of all that `from_disk` may read. Raises CheckpointError and OSError."""
    return digest([*_files(path), *head_files(Path(path))])


def _files(path: str) -> list[Path]:
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{path} does not exist")
    return [place] if place.is_file() else weight_files(place)


def from_shared_memory(name: str, size: int = 0) -> Incoming:
    """Safetensors bytes, the first `size` (0: all) of a POSIX shared memory. Raises CheckpointError."""
    if not re.fullmatch(r"/?[^/\0]{1,250}", name) or name.strip("/") in (".", ".."):
        raise CheckpointError(f"{name[:300]!r} is no name of a POSIX shared memory")
    return Incoming(list(read_safetensors(SHARED_MEMORY / name.strip("/"), size).items()))


def named_dtype(name: str) -> tuple[torch.dtype | None, str]:
    """The dtype that torch calls so, `bfloat16` or `torch.bfloat16`, and what safetensors calls it; None: none."""
    dtype: object = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        return None, name
    return dtype, next((short for short, known in DTYPES.items() if known == dtype), name)


class _Bytes:
    """A regular file that is read at given places. Closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no file")
        self.size = status.st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, begin: int, count: int) -> Tensor:
        """[count] uint8."""
        found = torch.empty(count, dtype=torch.uint8)
        view, done = found.numpy().data, 0
        while done < count:
            got = os.preadv(self._descriptor, [view[done:]], begin + done)
            if not got:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += got
        return found

    def tensor(self, begin: int, count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return self.read(begin, count).view(dtype).view(shape)


def read_safetensors(path: Path, size: int = 0) -> dict[str, Stored]:
    """The tensors of a file, or of its first `size` bytes. Raises CheckpointError that names what is out of bounds."""
    file = _Bytes(path)
    if size > file.size or size < 0:
        raise CheckpointError(f"{path} has {file.size} bytes, not {size}")
    size = size or file.size
    length = int.from_bytes(bytes(file.read(0, 8).numpy()), "little") if size >= 8 else size
    if length > min(size - 8, MOST_HEADER):
        raise CheckpointError(f"{path} is truncated or no safetensors file: its header would end at {length + 8}")
    try:
        header: Any = json.loads(bytes(file.read(8, length).numpy()))
        entries = {str(name): cast("dict[str, Any]", entry) for name, entry in header.items() if name != "__metadata__"}
        return {name: _stored(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no safetensors file: its header is damaged ({error})") from error


def _stored(file: _Bytes, name: str, entry: dict[str, Any], data: int, size: int) -> Stored:
    shape, (begin, end) = tuple(int(length) for length in entry["shape"]), map(int, entry["data_offsets"])
    dtype = (DTYPES | INTEGERS).get(entry["dtype"])
    whole = dtype is None or end - begin == math.prod(shape) * dtype.itemsize
    if min((0, *shape)) < 0 or not 0 <= begin <= end <= size - data or not whole:
        raise CheckpointError(f"{file.path}: {name} {list(shape)} does not lie at its bytes {begin} to {end}")
    read = partial(file.tensor, data + begin, end - begin, dtype or torch.uint8, shape)
    return Stored(file.path, shape, str(entry["dtype"]), read)
