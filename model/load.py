"""From a checkpoint directory to a `Model`, or from a config alone to one with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..kernels.cpu.native import native
from .checkpoint import Checkpoint, read_checkpoint
from .config import ModelConfig
from .heads import EmbedHead, LMHead, ScoreHead
from .linear import linears
from .model import AnyHead, Model
from .registry import ARCHITECTURES, Decoder
from .slots import Place
from .weights import Naming, Progress, digest, fill, slots_of

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
    on_progress: Progress | None = None,
) -> Model:
    """The model of a checkpoint, or of a checkpoint's directory as `read_checkpoint` takes it, on `device`.

    `dtype`: see `choose_dtype`. `deterministic`: a row's results have the same bits whatever rows are computed with it
    (for attention `Sequences.deterministic` says so). `context`: no sequence will be longer (see `Rope.within`).
    `on_progress(done, total)` is called with bytes. Raises CheckpointError that names what is wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    config, device = checkpoint.config, torch.device(device)
    if context is not None and config.rope is not None:
        config = replace(config, rope=config.rope.within(context))
    place = Place(choose_dtype(dtype, config, device), device, deterministic)
    decoder, head = unfilled(config, place)
    naming = naming_of(decoder, config, checkpoint.ignored)
    fill(decoder, head, naming, checkpoint.tensors, checkpoint.directory, on_progress or (lambda done, total: None))
    _pack(decoder, head)
    files = [checkpoint.directory / "config.json", *checkpoint.files]
    return Model(config, decoder, head, place, naming, digest(files))


def random_model(
    config: ModelConfig,
    *,
    dtype: DType = "auto",
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    seed: int = 0,
) -> Model:
    """A model of that config with random weights drawn on `device`: what speed and memory are measured with.

    Matrices [outs, ins] have deviation ins ** -0.5, norms lie about 1 and biases about 0, so that activations stay near
    1 and greedy text varies. The same seed gives the same weights on the same kind of device only.
    """
    device = torch.device(device)
    place = Place(choose_dtype(dtype, config, device), device, deterministic)
    decoder, head = unfilled(config, place)
    generator = torch.Generator(place.device).manual_seed(seed)
    for part in (decoder, head):
        for slot in slots_of(part):
            if slot.optional:
                continue
            if slot.into.dim() > 1:
                slot.into.normal_(0, slot.into.shape[1] ** -0.5, generator=generator)
            else:
                slot.into.normal_(float(slot.name.endswith("weight")), 0.1, generator=generator)
    _pack(decoder, head)
    return Model(config, decoder, head, place, naming_of(decoder, config), f"random {seed}")


def naming_of(decoder: Decoder, config: ModelConfig, ignored: str = "") -> Naming:
    """`ignored`: what else a checkpoint has that is not for this model."""
    prefixes = (decoder.PREFIX,) if isinstance(decoder.PREFIX, str) else decoder.PREFIX
    wrappers = WRAPPERS if config.labels else ()
    return Naming((*prefixes, *wrappers), "|".join(filter(None, (decoder.IGNORED, ignored))))


def unfilled(config: ModelConfig, place: Place) -> tuple[Decoder, AnyHead]:
    """Decoder and head as the config describes them, their weights not yet written."""
    entry = ARCHITECTURES[config.architecture]
    decoder = entry.family.decoder(config, place)
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


def _pack(decoder: Decoder, head: AnyHead) -> None:
    """Brings the filled matrices into the device's own order."""
    for part in (decoder, head):
        for _, linear in linears(part):
            linear.pack()


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
