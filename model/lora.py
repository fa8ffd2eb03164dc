"""LoRA adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors` (or .bin).

    y = W x + scale · B (A x),   scale = alpha / r, or alpha / √r with use_rslora

A tensor is called `base_model.model.PLACE.lora_A.weight` or `….lora_B.weight`, PLACE being the matrix' place in
transformers' model. A [r, ins] and B [outs, r] lie so also where the matrix itself is stored transposed (GPT-2's
Conv1D, PEFT's fan_in_fan_out).
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, Adapters
from .errors import CheckpointError
from .fields import Fields
from .incoming import read_safetensors
from .linear import Linear, linears
from .registry import Decoder
from .stored import DTYPES, Stored, digest, listed, open_file

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which they are looked for
NAME = re.compile(r"base_model\.model\.(?P<place>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights as well
# Fields that, unless null, false or empty, mean more than an A and a B beside each matrix.
MORE = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "megatron_config", "alora_invocation_tokens", "use_bdlora", "arrow_config"),
)
ALL_LINEAR = "all-linear"


class LoraConfig(NamedTuple):
    """What an adapter_config.json says of each matrix, by its place in transformers' model."""

    fields: Fields
    rank: int
    alpha: float
    rooted: bool  # the scale has √r
    ranks: Mapping[str, int]  # by pattern of the place's end
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | re.Pattern[str] | None  # ends of places; None: every matrix

    @classmethod
    def read(cls, path: Path) -> LoraConfig:
        """Raises CheckpointError that names the field, its value and what is supported."""
        fields = Fields.read(path)
        fields.choice("peft_type", allowed=("LORA",), default="")
        fields.choice("bias", allowed=("none",), default="none")
        fields.only("init_lora_weights", *PLAIN_STARTS)
        for name in MORE:
            if fields.get(name):
                raise fields.error(name, "leaving it out")
        patterns = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")
        ranks = {name: patterns[0].integer(name) for name in patterns[0].values}
        alphas = {name: patterns[1].number(name) for name in patterns[1].values}
        return cls(
            fields,
            fields.integer("r", default=8),
            fields.number("lora_alpha", 8.0),
            fields.flag("use_rslora", False),
            ranks,
            alphas,
            _targets(fields),
        )

    def rank_of(self, place: str) -> int:
        return next((rank for name, rank in self.ranks.items() if _ends(name, place)), self.rank)

    def scale_of(self, place: str) -> float:
        alpha = next((alpha for name, alpha in self.alphas.items() if _ends(name, place)), self.alpha)
        rank = self.rank_of(place)
        return alpha / (rank**0.5 if self.rooted else rank)

    def targeted(self, place: str) -> bool:
        if self.targets is None:
            return True
        if isinstance(self.targets, tuple):
            return any(_is_at(name, place) for name in self.targets)
        return self.targets.fullmatch(place) is not None


def _targets(fields: Fields) -> tuple[str, ...] | re.Pattern[str] | None:
    given = fields.get("target_modules")
    if given is None or given == ALL_LINEAR:
        return None
    if not isinstance(given, str):
        return tuple(fields.strings("target_modules") or ())
    try:
        return re.compile(given)
    except re.error as error:
        raise fields.error("target_modules", f"a list, {ALL_LINEAR!r} or a regular expression ({error})") from None


def _patterns(fields: Fields, name: str) -> Fields:
    """An object whose keys are regular expressions."""
    found = fields.object(name)
    for pattern in found.values:
        try:
            re.compile(_ending(pattern))
        except re.error as error:
            raise fields.error(name, f"regular expressions with a value each ({error} in {pattern!r})") from None
    return found


def _is_at(name: str, place: str) -> bool:
    return place == name or place.endswith(f".{name}")


def _ends(pattern: str, place: str) -> bool:
    """Whether a pattern of `rank_pattern` or `alpha_pattern` means that place."""
    return re.match(_ending(pattern), place) is not None


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def read_adapter(directory: Path, decoder: Decoder, room: Adapters) -> Adapter:
    """The adapter in a directory, checked and laid out for this decoder; nothing of the model changes.

    Raises CheckpointError that says what is not there, does not fit, or has no room.
    """
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} is no LoRA adapter: it has no {CONFIG}")
    config = LoraConfig.read(directory / CONFIG)
    file = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{directory} has no weights: none of {', '.join(FILES)}")
    found = _halves(file, config, decoder)
    rank = max(config.rank_of(place) for place in found)
    if rank > room.rank:
        raise CheckpointError(f"{directory} has rank {rank}; there is room for {room.rank}: raise --max-lora-rank")
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for path, linear in linears(decoder):
        parts = {index: place for place, (at, index, _) in found.items() if at == path}
        if parts:
            halves = {index: (found[place].halves, config.scale_of(place)) for index, place in parts.items()}
            matrices[path] = _laid_out(file, linear, halves, room)
    halves = [half for matrix in found.values() for half in matrix.halves.values()]
    size = sum(math.prod(half.shape) * DTYPES[half.dtype].itemsize for half in halves)
    return Adapter(directory, rank, matrices, len(halves), size, digest([directory / CONFIG, file]))


class _Matrix(NamedTuple):
    """Where the A and the B of one of the checkpoint's matrices go: which `Linear`, and which part of it."""

    path: str
    part: int
    halves: dict[str, Stored]


def _halves(file: Path, config: LoraConfig, decoder: Decoder) -> dict[str, _Matrix]:
    """By place in transformers' model. Everything in the file must fit, and every target must be there."""
    parts = {
        place: (path, linear, index)
        for path, linear in linears(decoder)
        for index, place in enumerate(linear.places(path))
    }
    prefixes = (decoder.PREFIX,) if isinstance(decoder.PREFIX, str) else decoder.PREFIX
    found: dict[str, _Matrix] = {}
    problems: dict[str, list[str]] = {}
    for name, stored in (read_safetensors if file.suffix == ".safetensors" else open_file)(file).items():
        match = NAME.fullmatch(name)
        place = match["place"] if match else ""
        inside = place.removeprefix(next((prefix for prefix in prefixes if place.startswith(prefix)), ""))
        if match is None or inside not in parts:
            problems.setdefault("no A or B of a matrix of this model's layers", []).append(name)
            continue
        path, linear, index = parts[inside]
        rank, half = config.rank_of(place), match["half"]
        shape = (rank, linear.ins) if half == "A" else (linear.outs[index], rank)
        halves = found.setdefault(place, _Matrix(path, index, {})).halves
        if half in halves:
            problems.setdefault("given twice", []).append(name)
        elif not config.targeted(place):
            problems.setdefault("not among target_modules", []).append(name)
        elif stored.shape != shape:
            wrong = f"{name} is {list(stored.shape)}, must be {list(shape)}"
            problems.setdefault("of the wrong shape", []).append(wrong)
        elif stored.dtype not in DTYPES:
            problems.setdefault(f"of a dtype other than {', '.join(DTYPES)}", []).append(f"{name} is {stored.dtype}")
        halves[half] = stored
    for place, matrix in found.items():
        if len(matrix.halves) == 1:
            problems.setdefault("without their other half", []).append(f"{place}.lora_{next(iter(matrix.halves))}")
    if isinstance(config.targets, tuple):
        for target in config.targets:
            if not any(_is_at(target, place) for place in found):
                problems.setdefault("missing though target_modules has them", []).append(target)
    if problems or not found:
        said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items())
        raise CheckpointError(f"{file}: tensors do not match {CONFIG} and the model: {said or 'there are none'}")
    return found


def _laid_out(
    file: Path, linear: Linear, parts: Mapping[int, tuple[dict[str, Stored], float]], room: Adapters
) -> tuple[Tensor, Tensor]:
    """A and B of one `Linear`; `parts`: of its matrices, by number, the stored halves and the scale."""
    a, b = room.staged(linear)
    inner, outer = a.split_with_sizes([room.rank] * len(linear.outs)), b.split_with_sizes(linear.outs, 1)
    for index, (halves, scale) in parts.items():
        down, up = halves["A"].read(), halves["B"].read().float() * scale
        up = up if linear.reordered is None else linear.reordered(up)
        inner[index][: len(down)].copy_(down)
        outer[index][: len(down)].copy_(up.T)
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        names = ", ".join(linear.names)
        raise CheckpointError(f"{file}: the matrices beside {names} are not finite in {a.dtype}")
    return a, b
