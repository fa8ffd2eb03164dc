"""Filling a decoder's slots from checkpoint files, one tensor at a time, and refusing by name what does not fit.

Safetensors files are mapped, not read into memory; `.bin` files go through torch.load with weights_only=True. What
headers tell (missing, unused, wrong shape or dtype) is checked before the first byte is copied.
"""

# safetensors and torch.load come without complete annotations.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import checkpoint_file
from .errors import CheckpointError
from .fields import Fields
from .slots import HasSlots, Slot

Progress = Callable[[int, int], None]  # bytes copied so far, bytes in all

# Single file, index of several, in the order in which they are looked for.
LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
NAMED = 8  # so many tensors of a kind are listed in a message


class Stored(NamedTuple):
    """A tensor of a checkpoint file, not read yet. `dtype` is named as safetensors does."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def find_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint: safetensors before .bin, a single file before an index."""
    checkpoint_file(directory, "config.json")
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
        raise CheckpointError(f"{index} names files outside its directory: {_some(outside)}")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing or not files:
        raise CheckpointError(f"{index} names weight files that are missing: {_some(missing) or 'it names none'}")
    paths = [index.parent / file for file in files]
    held = {name for path in paths for name in open_file(path)}
    if lost := sorted(set(names) - held):
        raise CheckpointError(f"{index} lists tensors that its files do not hold: {_some(lost)}")
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

            stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype(), read)
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


def fill(
    decoder: nn.Module,
    head: nn.Module,
    prefixes: str | tuple[str, ...],
    ignored: str,
    tensors: Sequence[tuple[str, Stored]],
    directory: Path,
    on_progress: Progress,
) -> None:
    """Copy every tensor of a checkpoint in `directory` into the slot of its name, converted to the slot's dtype.

    Decoder tensors may carry one of the prefixes; names that match `ignored` are passed over. Raises CheckpointError
    that lists what is missing, unused, given twice or of the wrong shape or dtype.
    """
    inside = {slot.name: slot for slot in slots_of(decoder)}
    outside = {slot.name: slot for slot in slots_of(head)}
    skip, prefixes = re.compile(ignored), (prefixes,) if isinstance(prefixes, str) else prefixes
    found: dict[str, tuple[Slot, Stored]] = {}
    problems: dict[str, list[str]] = {}
    for name, stored in tensors:
        short = name[len(next((prefix for prefix in prefixes if name.startswith(prefix)), "")) :]
        slot = inside.get(short) or outside.get(name)
        if slot is None:
            if not skip.fullmatch(short):
                problems.setdefault("not part of this architecture", []).append(name)
        elif slot.name in found:
            problems.setdefault("given twice", []).append(name)
        elif stored.shape != slot.shape:
            wrong = f"{name} is {list(stored.shape)}, must be {list(slot.shape)}"
            problems.setdefault("of the wrong shape", []).append(wrong)
        elif stored.dtype not in DTYPES:
            problems.setdefault(f"of a dtype other than {', '.join(DTYPES)}", []).append(f"{name} is {stored.dtype}")
        else:
            found[slot.name] = slot, stored
            continue
        if slot is not None:
            found.setdefault(slot.name, (slot, stored))  # known to be there, though wrong
    filled = {_storage(slot.into) for slot, _ in found.values()}
    for slot in (*inside.values(), *outside.values()):
        if not slot.optional and _storage(slot.into) not in filled:
            problems.setdefault("missing", []).append(slot.name)
    if problems:
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items())
        raise CheckpointError(f"{directory}: tensors do not match config.json: {listed}")
    _copy(list(found.values()), on_progress)


def _copy(pairs: list[tuple[Slot, Stored]], on_progress: Progress) -> None:
    total = sum(slot.into.nbytes for slot, _ in pairs)
    done, filled = 0, dict[tuple[int, int], str]()
    for slot, stored in pairs:
        tensor = slot.kept(stored.read())
        if (first := filled.get(_storage(slot.into))) is not None:  # tied and given twice
            if not torch.equal(slot.into, tensor.to(slot.into)):
                message = f"{stored.file}: {slot.name} differs from {first}, to which config.json ties it"
                raise CheckpointError(f"{message}; set tie_word_embeddings to false")
        else:
            slot.into.copy_(tensor)
            filled[_storage(slot.into)] = slot.name
            if slot.into.dtype == torch.float16 and tensor.dtype != torch.float16 and not slot.into.isfinite().all():
                message = f"{stored.file}: {slot.name} has values that float16 cannot hold"
                raise CheckpointError(f"{message}; choose --dtype bfloat16 or float32")
        done += slot.into.nbytes
        on_progress(done, total)


def slots_of(module: nn.Module) -> Iterator[Slot]:
    """Every slot of a module and its submodules."""
    for path, part in module.named_modules():
        if isinstance(part, HasSlots):
            yield from part.slots(path)


def digest(files: Iterable[Path]) -> str:
    """A cheap fingerprint: names, sizes and times of the files, and the tensor tables of safetensors files."""
    state = blake2b(digest_size=16)
    for file in files:
        stat = file.stat()
        state.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                state.update(stream.read(int.from_bytes(stream.read(8), "little")))
    return state.hexdigest()


def _storage(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
