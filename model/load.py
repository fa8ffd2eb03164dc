"""From a checkpoint directory to a `Model`, or from a config alone to one with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.cpu.native import native
from .checkpoint import Checkpoint, read_checkpoint
from .config import ModelConfig
from .errors import CheckpointError
from .heads import EmbedHead, LMHead, ScoreHead
from .linear import Linear, linears
from .model import AnyHead, Model
from .quantization import PLAIN, Quantization, WantedHead, WantedScheme, quantization_of
from .registry import ARCHITECTURES, Decoder
from .slots import Place, Slot
from .stored import digest
from .weights import Naming, Progress, Storage, fill, slots_of, storage_of

DType = Literal["auto", "float32", "bfloat16", "float16"]

# What trainers that wrap a decoder put before its tensors' names: DeepSpeed-Chat; trlx and Starling.
WRAPPERS = ("rwtransformer.", "transformer.")


def load_model(
    source: Checkpoint | str | Path,
    *,
    dtype: DType = "auto",
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    context: int | None = None,
    quantization: WantedScheme = "auto",
    lm_head: WantedHead = "auto",
    on_progress: Progress | None = None,
) -> Model:
    """The model of a checkpoint, or of a checkpoint's directory as `read_checkpoint` takes it, on `device`.

    `dtype`: see `choose_dtype`. `quantization`, `lm_head`: see `quantization_of`; tensors are quantized one by one as
    they are read. `deterministic`: a row's results have the same bits whatever rows are computed with it
    (for attention `Sequences.deterministic` says so). `context`: no sequence will be longer (see `Rope.within`).
    `on_progress(done, total)` is called with bytes. Raises CheckpointError that names what is wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    config, device = checkpoint.config, torch.device(device)
    if context is not None and config.rope is not None:
        config = replace(config, rope=config.rope.within(context))
    kept = quantization_of(quantization, lm_head, config.kind == "lm", _stored(checkpoint))
    place = Place(choose_dtype(dtype, config, device), device, deterministic, quantization=kept)
    decoder, head = unfilled(config, place)
    fill(
        decoder,
        head,
        naming_of(decoder, config, checkpoint.ignored),
        checkpoint.tensors,
        checkpoint.directory,
        on_progress or (lambda done, total: None),
        finite=kept.any,
        on_filled=_Finishing(decoder, head),
    )
    files = [checkpoint.directory / "config.json", *checkpoint.files]
    return Model(config, decoder, head, place, naming_of(decoder, config, checkpoint.ignored), digest(files))


def random_model(
    config: ModelConfig,
    *,
    dtype: DType = "auto",
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    quantization: WantedScheme = "auto",
    lm_head: WantedHead = "auto",
    seed: int = 0,
) -> Model:
    """A model of that config with random weights drawn on `device`: what speed and memory are measured with.

    Matrices [outs, ins] have deviation ins ** -0.5, norms lie about 1 and biases about 0, so that activations stay near
    1 and greedy text varies. The same seed gives the same weights on the same kind of device only, and quantized ones
    are quantized from the others.
    """
    device = torch.device(device)
    kept = quantization_of(quantization, lm_head, config.kind == "lm")
    place = Place(choose_dtype(dtype, config, device), device, deterministic, quantization=kept)
    decoder, head = unfilled(config, place)
    generator = torch.Generator(place.device).manual_seed(seed)
    for part in (decoder, head):
        for slot in slots_of(part):
            if not slot.optional:
                slot.write(_drawn(slot, place.dtype, generator))
    for part in (decoder, head):
        for _, linear in linears(part):
            linear.finish()
    return Model(config, decoder, head, place, naming_of(decoder, config), f"random {seed}")


def _drawn(slot: Slot, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """What the slot is to hold; `dtype`: of what is quantized then."""
    into = slot.into
    drawn = torch.empty(into.shape, dtype=into.dtype if slot.scale is None else dtype, device=into.device)
    if drawn.dim() > 1:
        return drawn.normal_(0, drawn.shape[1] ** -0.5, generator=generator)
    return drawn.normal_(float(slot.name.endswith("weight")), 0.1, generator=generator)


def naming_of(decoder: Decoder | type[Decoder], config: ModelConfig, ignored: str = "") -> Naming:
    """`ignored`: what else a checkpoint has that is not for this model."""
    prefixes = (decoder.PREFIX,) if isinstance(decoder.PREFIX, str) else decoder.PREFIX
    wrappers = WRAPPERS if config.labels else ()
    return Naming((*prefixes, *wrappers), "|".join(filter(None, (decoder.IGNORED, ignored))))


def _stored(checkpoint: Checkpoint) -> Quantization:
    """How a checkpoint has its matrices."""
    config = checkpoint.config
    if config.scheme == "none":
        return PLAIN
    family = ARCHITECTURES[config.architecture].family
    naming = naming_of(family.decoder, config)
    plain = {naming.short(name).removesuffix(".weight") for name, stored in checkpoint.tensors if stored.int8 is None}
    heads = {"lm_head.weight", f"{family.older_head}.weight"}
    quantized = any(stored.int8 is not None for name, stored in checkpoint.tensors if name in heads)
    return Quantization(config.scheme, "int8" if quantized else "none", frozenset(plain))


def unfilled(config: ModelConfig, place: Place) -> tuple[Decoder, AnyHead]:
    """Decoder and head as the config describes them, their weights not yet written."""
    entry = ARCHITECTURES[config.architecture]
    decoder = entry.family.decoder(config, place)
    for path, linear in linears(decoder):
        plain = [matrix in place.quantization.plain for matrix in linear.places(path)]
        if len(set(plain)) > 1:
            apart = ", ".join(linear.places(path))
            raise CheckpointError(f"of {apart}, which are computed as one, some are quantized and some are not")
        if plain[0]:
            linear.keep_plain(place)
    if config.kind == "embed":
        return decoder, EmbedHead()
    if config.labels:
        return decoder, ScoreHead(config.score, config.labels, config.output_size, place)
    tied = decoder.embedding if config.tied else None
    head = LMHead(
        config.vocab_size,
        config.output_size,
        place,
        tied,
        bias=config.head_bias,
        softcap=config.logit_softcap,
        older=entry.family.older_head,
    )
    return decoder, head


class _Finishing:
    """Called with each slot that was filled, finishes every matrix with its last one: no more than one of them is then
    held both as it was filled and as the device computes with it."""

    def __init__(self, *parts: nn.Module) -> None:
        self._empty: dict[Linear, set[Storage]] = {}
        self._waiting: dict[Storage, list[Linear]] = {}
        for path, linear in (named for part in parts for named in linears(part)):
            self._empty[linear] = {storage_of(slot.into) for slot in linear.slots(path)}
            for storage in self._empty[linear]:
                self._waiting.setdefault(storage, []).append(linear)

    def __call__(self, slot: Slot) -> None:
        storage = storage_of(slot.into)
        for linear in self._waiting.pop(storage, ()):
            self._empty[linear].remove(storage)
            if not self._empty[linear]:
                linear.finish()


def choose_dtype(dtype: DType, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, but on CPUs without bfloat16 instructions float32: that costs nothing there
    and rounds less, matrices stay in bfloat16 (`ops.pack`). float16 is never what `auto` takes on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cpu":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if config.dtype != "float32" and cpu_has_bfloat16() else torch.float32


def matrix_dtype(dtype: torch.dtype, config: ModelConfig, device: torch.device) -> torch.dtype:
    """What matrices of such a checkpoint are kept in where a model computes in `dtype`: see `ops.pack`."""
    exact = dtype == torch.float32 and config.dtype == "bfloat16"
    return torch.bfloat16 if exact and device.type == "cpu" and native() is not None else dtype


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 (avx512_bf16 or AMX)."""
    cpu = torch.cpu  # the checks are private to torch and the only ones that ask the processor
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
