"""From a checkpoint directory to a `Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from .config import ModelConfig, read_config
from .heads import LMHead, ScoreHead
from .linear import linears
from .model import Model
from .registry import ARCHITECTURES
from .slots import Place
from .weights import Progress, digest, fill, find_files

DType = Literal["auto", "float32", "bfloat16", "float16"]
DecodeCopy = Literal["fp16"]


def load_model(
    path: str | Path,
    *,
    dtype: DType = "auto",
    device: torch.device | str = "cpu",
    decode_copy: DecodeCopy | None = None,
    on_progress: Progress | None = None,
) -> Model:
    """The model of a Hugging Face checkpoint directory, on `device`.

    `dtype`: see `choose_dtype`. `decode_copy` "fp16" keeps a second, float16 copy of the matrices for steps of one
    or two rows. `on_progress(done, total)` is called with bytes. Raises CheckpointError that names what is wrong.
    """
    directory, device = Path(path), torch.device(device)
    config = read_config(directory)
    files = find_files(directory)
    entry = ARCHITECTURES[config.architecture]
    place = Place(choose_dtype(dtype, config, device), device)
    decoder = entry.family.decoder(config, place)
    if entry.head == "lm":
        tied = decoder.embedding if config.tied else None
        head = LMHead(config.vocab_size, config.hidden_size, place, tied)
    else:
        head = ScoreHead(config.labels, config.hidden_size, device)
    fill(decoder, head, decoder.PREFIX, decoder.IGNORED, files, on_progress or (lambda done, total: None))
    for part in (decoder, head):
        for name, linear in linears(part):
            if decode_copy is not None:
                linear.add_decode_copy(name)
            linear.pack(keep_plain=part is head)
    return Model(config, decoder, head, place.dtype, digest([directory / "config.json", *files]))


def choose_dtype(dtype: DType, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, but on CPUs without bfloat16 instructions float32: there a bfloat16 matrix
    product of 32 rows takes five times as long (measured on AVX2). float16 is never what `auto` takes on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cpu":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if config.dtype != "float32" and cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 (avx512_bf16 or AMX)."""
    cpu = torch.cpu  # the checks are private to torch and the only ones that ask the processor
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
