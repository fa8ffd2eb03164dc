"""SmoothQuant (Xiao et al. 2023): what is hard to quantize in a norm's result goes over into the matrices that read it.

    y = norm(x) · Wᵀ = (norm(x) / s) · (W s)ᵀ        s_j = max|X_j|^α / max|W_j|^(1 - α)

X_j is column j of the norm's results over a text, W_j that of all matrices that read it. 1 / s goes into the norm's
weights, s into the matrices, so nothing is left to be computed when the model serves. No family says which norms can do
that: a run shows whose result a matrix reads, and another one, with powers of two for s, that nothing else reads it.

Letters: T tokens, D columns of a norm's result.
"""

# torch leaves the types of named_modules and of hooks open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .linear import Embedding, Linear, linears
from .model import Model
from .quantize import Change, Source
from .reading import read_texts
from .slots import Slot
from .weights import slots_at

Progress = Callable[[int, int], None]  # texts read so far, texts in all
SHORT = 32  # tokens that tell which matrices read which norm


@dataclass(frozen=True)
class Fed:
    """A norm whose result matrices read and nothing else does: the names of its weights and of theirs."""

    slots: tuple[Slot, ...]
    matrices: tuple[str, ...]
    norm: nn.Module
    readers: tuple[Linear, ...]


def smooth(
    model: Model, source: Source, texts: Sequence[Sequence[int]], alpha: float, on_progress: Progress
) -> dict[str, Change]:
    """What is done to the tensors of `source`, by name. `model` is the same checkpoint, `texts` are of its tokens.

    Raises CheckpointError where the family has no such norms.
    """
    fed = find_fed(model, texts[0][:SHORT])
    if not fed:
        raise CheckpointError(
            f"{source.directory}: SmoothQuant needs norms whose results only matrices read, and "
            f"{source.config.architecture} has none; leave --smooth-quant out"
        )
    peaks = _peaks(model, fed, texts, on_progress)
    changes: dict[str, Change] = {}
    for one, peak in zip(fed, peaks, strict=True):
        changes |= _folded(one, factors(peak, one.readers, alpha), source)
    return changes


def factors(peak: Tensor, readers: Sequence[Linear], alpha: float) -> Tensor:
    """s [D] float32 of the columns' largest sizes [D]; 1 where nothing comes or nothing reads."""
    read = torch.stack([reader.weight.float().abs().amax(0) for reader in readers]).amax(0)
    return torch.where((peak > 0) & (read > 0), peak**alpha / read ** (1 - alpha), 1.0)


def find_fed(model: Model, text: Sequence[int]) -> list[Fed]:
    """The norms of the decoder whose results only matrices read."""
    found = _candidates(model, text)
    if found and not _alone(model, text, found):
        found = [one for one in found if _alone(model, text, [one])]
    return found


def _candidates(model: Model, text: Sequence[int]) -> list[Fed]:
    """The norms whose results some matrix reads."""
    results: dict[int, tuple[str, Tensor]] = {}  # by address; held, so that none is used twice
    readers: dict[str, list[tuple[str, Linear]]] = {}

    def came(path: str, norm: nn.Module, given: Any, result: Tensor) -> None:
        results[result.data_ptr()] = path, result

    def read(path: str, linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        norm, result = results.get(given[0].data_ptr(), ("", given[0]))
        if norm and result.shape == given[0].shape:
            assert isinstance(linear, Linear)
            readers.setdefault(norm, []).append((path, linear))

    norms = dict(_norms(model.decoder))
    with ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.enter_context(norm.register_forward_hook(partial(came, path)))
        for path, linear in linears(model.decoder):
            hooks.enter_context(linear.register_forward_pre_hook(partial(read, path)))
        read_texts(model, [text])
    return [
        Fed(
            tuple(slots_at(norms[norm], norm)),
            tuple(f"{place}.weight" for path, linear in pairs for place in linear.places(path)),
            norms[norm],
            tuple(linear for _, linear in pairs),
        )
        for norm, pairs in readers.items()
    ]


def _norms(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with weights that all have one dimension."""
    for path, module in decoder.named_modules():
        slots = [] if isinstance(module, Linear | Embedding) else slots_at(module, path)
        if slots and all(slot.into.dim() == 1 for slot in slots):
            yield path, module


def _alone(model: Model, text: Sequence[int], fed: Sequence[Fed]) -> bool:
    """Whether nothing changes, not a bit, where these norms give s times less and their matrices read s times more.

    With powers of two for s both are exact, so that it shows if anybody else reads them.
    """
    plain = read_texts(model, [text])[0]
    with ExitStack() as hooks:
        for one in fed:
            columns = torch.arange(one.slots[0].into.numel(), device=model.place.device)
            s = torch.where(columns % 2 == 0, 2.0, 0.5).to(model.dtype)

            def less(norm: nn.Module, given: Any, result: Tensor, s: Tensor = s) -> Tensor:
                return result / s

            def more(linear: nn.Module, given: tuple[Tensor, ...], s: Tensor = s) -> tuple[Tensor, ...]:
                return (given[0] * s, *given[1:])

            hooks.enter_context(one.norm.register_forward_hook(less))
            for reader in one.readers:
                hooks.enter_context(reader.register_forward_pre_hook(more))
        return torch.equal(plain, read_texts(model, [text])[0])


def _peaks(model: Model, fed: Sequence[Fed], texts: Sequence[Sequence[int]], on_progress: Progress) -> list[Tensor]:
    """max|X_j| [D] float32 of each norm over all texts."""
    peaks = [torch.zeros(one.slots[0].into.numel(), device=model.place.device) for one in fed]

    def note(norm: nn.Module, given: Any, result: Tensor, *, peak: Tensor) -> None:
        torch.maximum(peak, result.float().abs().amax(0), out=peak)

    with ExitStack() as hooks:
        for one, peak in zip(fed, peaks, strict=True):
            hooks.enter_context(one.norm.register_forward_hook(partial(note, peak=peak)))
        for number, text in enumerate(texts, 1):
            read_texts(model, [text])
            on_progress(number, len(texts))
    return peaks


def _folded(one: Fed, s: Tensor, source: Source) -> dict[str, Change]:
    """The changes of a norm and its matrices. What the norm's dtype rounds off of 1 / s, the matrices make good."""
    s = s.cpu()
    changes: dict[str, Change] = {}
    for slot in one.slots:
        name = source.names[slot.name]
        stored = source.tensors[name].read()
        offset = slot.kept(torch.zeros_like(stored)).float()  # 1 of Gemma's norms, whose weight is 1 + what is stored
        weight = stored.float() + offset
        if slot.name.endswith(".weight"):
            new = (weight / s - offset).to(stored.dtype)
            kept = new.float() + offset
            exact = (weight != 0) & (kept != 0)
            new = torch.where(exact, new, stored)
            s = torch.where(exact, weight / kept, 1.0)
        else:  # a bias, behind the weight
            new = (weight / s - offset).to(stored.dtype)
        changes[name] = partial(_instead, new)
    for matrix in one.matrices:
        name = source.names[matrix]
        changes[name] = partial(_times, s.unsqueeze(1) if source.transposed[name] else s)
    return changes


def _instead(new: Tensor, stored: Tensor) -> Tensor:
    return new


def _times(s: Tensor, stored: Tensor) -> Tensor:
    return stored.float() * s
