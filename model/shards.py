"""Writing safetensors files while their tensors are made: what a header says is known before the first one is there.

The library's own writer takes all tensors of a file at once. The format: 8 bytes with the length of the header, the
header (JSON: dtype, shape and place of each tensor), the bytes of the tensors, one behind another without gaps.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError
from .weights import Progress

INDEX = "model.safetensors.index.json"
# By safetensors' names. Tensors with wider elements lie first in a file, so that each begins at a multiple of its own.
NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Header(NamedTuple):
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Tensors of one file that are made together, when they are written."""

    headers: Mapping[str, Header]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())


def write_shards(directory: Path, pieces: Sequence[Piece], most: int, on_progress: Progress) -> list[Path]:
    """Writes `model.safetensors`, or several files of at most `most` bytes and their index; a larger piece is a file.

    `on_progress(done, total)` is called with bytes. Raises what `make` does and OSError.
    """
    shards = _divided(pieces, most)
    total, done = sum(piece.nbytes for piece in pieces), 0
    files = [directory / _name(number, len(shards)) for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        headers = {name: header for piece in shard for name, header in piece.headers.items()}
        with file.open("wb") as stream:
            places = _write_header(stream, headers)
            for piece in shard:
                for name, tensor in piece.make().items():
                    assert (tensor.dtype, tuple(tensor.shape)) == headers[name], name
                    stream.seek(places[name])
                    stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                done += piece.nbytes
                on_progress(done, total)
    if len(files) > 1:
        where = {
            name: file.name
            for file, shard in zip(files, shards, strict=True)
            for piece in shard
            for name in piece.headers
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return files


def _divided(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_header(stream: BinaryIO, headers: Mapping[str, Header]) -> dict[str, int]:
    """Where in the file the bytes of each tensor begin."""
    ordered = sorted(headers, key=lambda name: (-headers[name].dtype.itemsize, name))
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in ordered:
        header = headers[name]
        begins[name], end = end, end + header.nbytes
        content[name] = {"dtype": NAMES[header.dtype], "shape": header.shape, "data_offsets": [begins[name], end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}


def header_dtype(name: str) -> torch.dtype:
    """The dtype that a `Stored` names, as safetensors does or as torch. Raises CheckpointError for others."""
    for dtype, known in NAMES.items():
        if name in (known, str(dtype)):
            return dtype
    raise CheckpointError(f"tensors of dtype {name} cannot be written: one of {', '.join(NAMES.values())}")
