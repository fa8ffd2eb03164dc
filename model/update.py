"""New weights for a model that serves: laid ready in host memory, then copied into place.

They are staged as a checkpoint is loaded, into modules of the same config, so that fused and tied matrices, rows in
another order, changed values and the device's own order of a matrix come out as they would at a start. What a start
makes of a matrix (`Slot.write` quantizes, `Linear.finish` packs) is made of it here, before anything that serves
changes. What an update leaves out of a fused matrix is taken over as the model has it, not quantized once more.
"""

# torch leaves the types of buffers and modules open.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .compressed_tensors import joined
from .linear import Linear
from .load import unfilled
from .model import Model
from .stored import Stored
from .weights import Filling, slots_at


class Update:
    """`stage` in any number of rounds, then `complete`, in any thread and while the model computes; then `commit`,
    between two of its steps. Only staging and completing can fail on what was given: nothing has changed then.

    `tensors` and `bytes` count what came, as it came.
    """

    def __init__(self, model: Model) -> None:
        on_gpu = model.place.device.type == "cuda"
        place = model.place._replace(device=torch.device("cpu"), pinned=on_gpu)
        self._parts = unfilled(model.config, place)
        self._filling = Filling(*self._parts, model.naming, "the update")
        self._model = model
        self._pairs: list[tuple[nn.Module, nn.Module]] = []  # (module that serves, its new content)
        self.tensors = self.bytes = 0

    def stage(self, tensors: Iterable[tuple[str, Stored]], complete: bool = False) -> None:
        """Reads, checks and converts; a matrix may come in int8, with its scale in the same round, where the model has
        it so. `complete`: no tensor of the model may be missing afterwards.

        Raises CheckpointError that names the tensors at fault; then the update cannot be used any more.
        """
        pairs = self._filling.match(joined(tensors), complete)
        self.tensors += len(pairs)
        self.bytes += sum(stored.nbytes for _, stored in pairs)
        self._filling.copy(pairs, lambda done, total: None, finite=True)

    def complete(self, partial: bool) -> None:
        """No more comes. `partial`: what is missing stays what it is; else CheckpointError names it."""
        if not partial:
            self._filling.match((), complete=True)
        for path, live, staged in self._modules():
            slots = slots_at(staged, path)
            filled = [self._filling.has(slot) for slot in slots]
            if not any(filled):
                continue
            if partial and not all(filled):
                for slot, known, current in zip(slots, filled, slots_at(live, path), strict=True):
                    if not known:
                        slot.take(current)
            self._pairs.append((live, staged))
        for live, staged in self._pairs:
            if isinstance(live, Linear) and isinstance(staged, Linear):
                staged.finish(pack=live.packed is not None)

    def touches(self, other: Model) -> bool:
        """Whether `commit` changes that model, too."""
        theirs = {id(module) for part in (other.decoder, other.head) for module in part.modules()}
        return any(id(live) in theirs for live, _ in self._pairs)

    @torch.no_grad()
    def commit(self) -> None:
        """Puts the new weights where the old ones are: recorded work finds them. The model computes nothing now."""
        device = self._model.place.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        written: set[int] = set()
        for live, staged in self._pairs:
            for name, tensor in staged.named_buffers():
                into = live.get_buffer(name)
                if into.data_ptr() not in written:  # tied ones are written once
                    into.copy_(tensor, non_blocking=True)
                    written.add(into.data_ptr())
            if isinstance(live, Linear) and isinstance(staged, Linear):
                live.matrix.exchange(staged.matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _modules(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """The place of every module, itself, and the one that is filled for it."""
        for part, filled in zip((self._model.decoder, self._model.head), self._parts, strict=True):
            for (path, live), staged in zip(part.named_modules(), filled.modules(), strict=True):
                yield path, live, staged
