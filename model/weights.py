"""Filling a decoder's slots from checkpoint files, one tensor at a time, and refusing by name what does not fit.

What headers tell (missing, unused, wrong shape or dtype) is checked before the first byte is copied.
"""

# torch leaves the types of named_modules open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .slots import HasSlots, Slot
from .stored import DTYPES, Stored, listed

Progress = Callable[[int, int], None]  # bytes copied so far, bytes in all
Storage = tuple[int, int]  # address and elements: tied tensors have the same


class Naming(NamedTuple):
    """How a checkpoint names a decoder's tensors: perhaps with one of the prefixes; what matches `ignored` is no weight
    of this model."""

    prefixes: tuple[str, ...]
    ignored: str

    def short(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return name[len(next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")) :]


class Filling:
    """Copies tensors into the slots of a decoder and its head, by name, in any number of rounds.

    `where` begins the messages of CheckpointErrors.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, naming: Naming, where: object) -> None:
        self._inside = {slot.name: slot for slot in slots_of(decoder)}
        self._outside = {slot.name: slot for slot in slots_of(head)}
        self._naming, self._skip, self._where = naming, re.compile(naming.ignored), where
        self._found: set[str] = set()  # names of the slots for which a tensor came
        self._filled: dict[Storage, str] = {}

    def match(self, tensors: Iterable[tuple[str, Stored]], complete: bool) -> list[tuple[Slot, Stored]]:
        """The slot of each tensor. `complete`: after this round no slot may be empty.

        Raises CheckpointError that lists what is missing, unused, given twice or of the wrong shape or dtype.
        """
        pairs: dict[str, tuple[Slot, Stored]] = {}
        problems: dict[str, list[str]] = {}
        for name, stored in tensors:
            short = self._naming.short(name)
            slot = self._inside.get(short) or self._outside.get(name)
            if slot is None:
                if not self._skip.fullmatch(short):
                    problems.setdefault("not part of this architecture", []).append(name)
                continue
            if slot.name in self._found:
                problems.setdefault("given twice", []).append(name)
            elif stored.shape != (shape := slot.shape_of(upright=stored.int8 is not None and stored.int8.as_outputs)):
                wrong = f"{name} is {list(stored.shape)}, must be {list(shape)}"
                problems.setdefault("of the wrong shape", []).append(wrong)
            elif stored.dtype not in DTYPES and not (stored.int8 is not None and slot.scale is not None):
                wrong = f"{name} is {stored.dtype}"
                problems.setdefault(f"of a dtype other than {', '.join(DTYPES)}", []).append(wrong)
            else:
                pairs[slot.name] = slot, stored
            self._found.add(slot.name)  # known to be there, even if wrong
        if complete and (missing := self._missing()):
            problems["missing"] = missing
        if problems:
            said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items())
            raise CheckpointError(f"{self._where}: tensors do not match config.json: {said}")
        return list(pairs.values())

    def copy(
        self,
        pairs: list[tuple[Slot, Stored]],
        on_progress: Progress,
        finite: bool = False,
        on_filled: Callable[[Slot], None] = lambda slot: None,
    ) -> None:
        """Reads the tensors and converts them to what their slots keep; `pairs` is used up. `finite`: refuses those
        with other numbers. `on_filled` is called after each.

        The largest come first: what a tensor takes beside the storage that is filled then adds least to the most
        memory that is held at once.
        """
        pairs.reverse()
        pairs.sort(key=lambda pair: pair[0].into.nbytes)
        total, done = sum(slot.into.nbytes for slot, _ in pairs), 0
        while pairs:
            slot, stored = pairs.pop()
            tensor = stored.read()
            if (first := self._filled.get(storage_of(slot.into))) is not None:  # tied and given twice
                if not torch.equal(slot.into, slot.kept(tensor).to(slot.into)):
                    message = f"{stored.file}: {slot.name} differs from {first}, to which config.json ties it"
                    raise CheckpointError(f"{message}; set tie_word_embeddings to false")
            else:
                _write(slot, stored, tensor, finite)
                self._filled[storage_of(slot.into)] = slot.name
                on_filled(slot)
            if stored.mapped:
                _let_go(tensor)
            done += slot.into.nbytes
            on_progress(done, total)

    def forget(self) -> None:
        """The slots: nothing is matched any more."""
        self._inside.clear()
        self._outside.clear()

    def has(self, slot: Slot) -> bool:
        """Whether the slot, or one that is tied to it, is filled."""
        return storage_of(slot.into) in self._filled

    def _missing(self) -> list[str]:
        slots = {**self._inside, **self._outside}
        found = {storage_of(slots[name].into) for name in self._found}
        return [name for name, slot in slots.items() if not slot.optional and storage_of(slot.into) not in found]


def fill(
    decoder: nn.Module,
    head: nn.Module,
    naming: Naming,
    tensors: Iterable[tuple[str, Stored]],
    directory: Path,
    on_progress: Progress,
    finite: bool = False,
    on_filled: Callable[[Slot], None] = lambda slot: None,
) -> None:
    """Copy every tensor of a checkpoint in `directory` into the slot of its name. See `Filling.copy`.

    A module may let go of its slots' storage once they are filled: nobody else holds it any more.
    """
    filling = Filling(decoder, head, naming, directory)
    pairs = filling.match(tensors, complete=True)
    filling.forget()
    filling.copy(pairs, on_progress, finite, on_filled)


def _write(slot: Slot, stored: Stored, tensor: Tensor, finite: bool) -> None:
    if stored.int8 is not None:
        slot.write_int8(tensor, stored.int8.scales(len(slot.into)), upright=stored.int8.as_outputs)
        return
    kept, into = slot.kept(tensor), slot.into
    wrong = not slot.write(kept)
    narrowed = into.dtype == torch.float16 and kept.dtype != torch.float16
    if slot.scale is None and (narrowed or finite) and not all_finite(into):
        if narrowed and all_finite(kept):
            message = f"{stored.file}: {slot.name} has values that float16 cannot hold"
            raise CheckpointError(f"{message}; choose --dtype bfloat16 or float32")
        wrong = finite
    if wrong:
        raise CheckpointError(f"{stored.file}: {slot.name} has values that are not finite")


def _let_go(tensor: Tensor) -> None:
    """Of a mapped tensor's pages, which count as this process's memory. Who reads it again finds them in the file."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def all_finite(tensor: Tensor) -> bool:
    """By the extremes, which NaN would be: 20 times as fast as a flag for each number."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def slots_of(module: nn.Module) -> Iterator[Slot]:
    """Every slot of a module and its submodules."""
    for path, part in module.named_modules():
        yield from slots_at(part, path)


def slots_at(module: nn.Module, path: str) -> list[Slot]:
    """The module's own, where it has any."""
    return list(module.slots(path)) if isinstance(module, HasSlots) else []


def storage_of(tensor: Tensor) -> Storage:
    return tensor.data_ptr(), tensor.numel()
