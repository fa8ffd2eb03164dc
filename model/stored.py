"""The weight files of a checkpoint: which they are, and their tensors by name, not read yet.

Safetensors files are mapped, not read into memory; `.bin` files go through torch.load with weights_only=True.
"""

# safetensors and torch.load come without complete annotations.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import checkpoint_file
from .errors import CheckpointError
from .fields import Fields

# Single file, index of several, in the order in which they are looked for.
LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # what quantized matrices are made of
NAMED = 8  # so many tensors of a kind are listed in a message


class Int8Rows(NamedTuple):
    """What makes a tensor of int8 values a matrix: `scales(outs)` reads a float32 scale for each of its outputs.

    `as_outputs`: rows are outputs also where the checkpoint has its other matrices transposed.
    """

    scales: Callable[[int], Tensor]
    as_outputs: bool


class Stored(NamedTuple):
    """A tensor of a checkpoint file, not read yet. `dtype` is named as safetensors does. `mapped`: what `read` gives
    lies in the file."""

    file: Path | str  # or where else it comes from
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    mapped: bool = False
    int8: Int8Rows | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES | INTEGERS)[self.dtype].itemsize


def find_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, which has a config.json. Raises CheckpointError."""
    checkpoint_file(directory, "config.json")
    return weight_files(directory)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: safetensors before .bin, a single file before an index."""
    for single, index in LAYOUTS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed(directory / index)
    wanted = ", ".join(name for layout in LAYOUTS for name in layout)
    raise CheckpointError(f"{directory} has no weights: none of {wanted}")


def _indexed(index: Path) -> list[Path]:
    """The files of an index, each of which must be there."""
    names = Fields.read(index).object("weight_map").values
    files = sorted({str(name) for name in names.values()})
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{index} names files outside its directory: {listed(outside)}")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing or not files:
        raise CheckpointError(f"{index} names weight files that are missing: {listed(missing) or 'it names none'}")
    paths = [index.parent / file for file in files]
    held = {name for path in paths for name in open_file(path)}
    if lost := sorted(set(names) - held):
        raise CheckpointError(f"{index} lists tensors that its files do not hold: {listed(lost)}")
    return paths


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name. Raises CheckpointError that names a file which cannot be read."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickled(path)


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        stored: dict[str, Stored] = {}
        for name in file.keys():  # noqa: SIM118  (not a dict)
            part = file.get_slice(name)

            def read(name: str = name) -> Tensor:
                return file.get_tensor(name)

            stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype(), read, mapped=True)
        return stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): download it again") from error


def _open_pickled(path: Path) -> dict[str, Stored]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        message = f"{path} is damaged or holds more than tensors, which is never loaded"
        raise CheckpointError(f"{message}; convert the checkpoint to safetensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} must hold tensors by name")
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: Stored(
            path, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), lambda tensor=tensor: tensor
        )
        for name, tensor in cast(dict[str, Tensor], tensors).items()
    }


def digest(files: Iterable[Path]) -> str:
    """A cheap fingerprint: names, sizes and times of the files, and the tensor tables of safetensors files."""
    state = blake2b(digest_size=16)
    for file in files:
        stat = file.stat()
        state.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                state.update(stream.read(min(int.from_bytes(stream.read(8), "little"), stat.st_size)))
    return state.hexdigest()


def listed(names: list[Any]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
