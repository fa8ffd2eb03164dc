"""Writing a checkpoint with its decoder's matrices in int8, tensor by tensor, as `compressed_tensors.py` reads it.

`w8a8` becomes `int-quantized` and `int8` `pack-quantized`, which vLLM reads, too. A matrix that a checkpoint keeps as
[D, O] (GPT-2) stays so in the former and is [O, D / 4] packed: what vLLM expects of either. The numbers are those of
`ops.quantize_rows`, so that a checkpoint serves, bit by bit, as one that is quantized while it is loaded.

Letters: O outputs of a matrix, D inputs.
"""

# torch leaves the types of named_modules open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.ops import Int8
from .checkpoint import head_files, open_files
from .compressed_tensors import PACKED, SCALE, SHAPE
from .config import checkpoint_file, read_config
from .errors import CheckpointError
from .fields import Fields
from .linear import Embedding, linears
from .load import WRAPPERS
from .quantization import quantize_into
from .registry import ARCHITECTURES, Decoder
from .shards import Header, Piece, header_dtype, write_shards
from .slots import Place
from .stored import Stored, find_files, listed
from .weights import Progress, all_finite

WrittenScheme = Literal["int8", "w8a8"]
Change = Callable[[Tensor], Tensor]

SHARD_BYTES = 5 * 10**9
FORMATS: Mapping[WrittenScheme, str] = {"int8": "pack-quantized", "w8a8": "int-quantized"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
# Weights in any format, and what tells where they are: none of it is copied.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Written(NamedTuple):
    """`matrices` in int8; bytes of all tensors before and after."""

    files: list[Path]
    matrices: int
    bytes_before: int
    bytes_after: int


class Source:
    """A checkpoint that is not quantized, and which of its tensors are matrices. Raises CheckpointError."""

    def __init__(self, directory: Path) -> None:
        fields = Fields.read(checkpoint_file(directory, "config.json"))
        if fields.get("quantization_config") is not None:
            raise CheckpointError(f"{directory} is quantized already: give the checkpoint that it was made from")
        self.config, self.directory = read_config(directory), directory
        self.tensors = dict(open_files(find_files(directory)))
        place = Place(torch.float32, torch.device("meta"))
        self.decoder: Decoder = ARCHITECTURES[self.config.architecture].family.decoder(self.config, place)
        prefixes = (self.decoder.PREFIX,) if isinstance(self.decoder.PREFIX, str) else self.decoder.PREFIX
        self.names = {_short(name, (*prefixes, *WRAPPERS)): name for name in self.tensors}  # by name in the decoder
        self.transposed = dict(self._matrices())  # by name of the tensor: whether it is [D, O]

    @property
    def nbytes(self) -> int:
        return sum(Header(header_dtype(one.dtype), one.shape).nbytes for one in self.tensors.values())

    def _matrices(self) -> Iterator[tuple[str, bool]]:
        wanted = {
            f"{place}.weight": linear.stored_transposed
            for path, linear in linears(self.decoder)
            for place in linear.places(path)
        }
        if missing := [name for name in wanted if name not in self.names]:
            raise CheckpointError(f"{self.directory}: {len(missing)} matrices are missing: {listed(missing)}")
        for name, transposed in wanted.items():
            yield self.names[name], transposed

    def kept(self) -> list[str]:
        """Modules with a matrix that stays as it is, embeddings aside: heads, and parts that are not the decoder's."""
        embeddings = {
            self.names.get(f"{path}.weight")
            for path, module in self.decoder.named_modules()
            if isinstance(module, Embedding)
        }
        others = self.tensors.keys() - self.transposed.keys() - embeddings
        matrices = [name for name in others if name.endswith(".weight") and len(self.tensors[name].shape) == 2]
        kept = {name.removesuffix(".weight") for name in matrices}
        return sorted(kept | ({"lm_head"} if self.config.generates else set()))


def quantize(
    source: Source,
    target: Path,
    scheme: WrittenScheme,
    *,
    changes: Mapping[str, Change] | None = None,
    most: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total: None,
) -> Written:
    """Writes the checkpoint into `target`, which must be empty or not exist; it is there when it is whole.

    `changes`: what is done to tensors first, by name. `most`: bytes of a file. `on_progress(done, total)` is called
    with bytes. Raises CheckpointError, for a tensor with values that are not finite with its name, and OSError.
    """
    check_target(target)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        pieces = [_piece(source, name, scheme, (changes or {}).get(name)) for name in source.tensors]
        files = write_shards(part, pieces, most, on_progress)
        _copy_others(source, part)
        values: dict[str, Any] = json.loads((source.directory / "config.json").read_text("utf-8"))
        values["quantization_config"] = quantization_config(scheme, source.kept())
        (part / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    after = sum(piece.nbytes for piece in pieces)
    return Written([target / file.name for file in files], len(source.transposed), source.nbytes, after)


def check_target(target: Path) -> None:
    """Raises CheckpointError where something is there already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: give another place")


def quantization_config(scheme: WrittenScheme, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of it."""
    group = {
        "targets": ["Linear"],
        "weights": {**INT8, "strategy": "channel", "dynamic": False},
        "input_activations": {**INT8, "strategy": "token", "dynamic": True} if scheme == "w8a8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def packed(values: Tensor) -> Tensor:
    """values [O, D] int8 -> [O, ceil(D / 4)] int32."""
    shifted = F.pad((values.to(torch.int16) + 128).to(torch.uint8), (0, -values.shape[1] % 4))
    return shifted.contiguous().view(torch.int32)


def _short(name: str, prefixes: tuple[str, ...]) -> str:
    return name[len(next((prefix for prefix in prefixes if name.startswith(prefix)), "")) :]


def _piece(source: Source, name: str, scheme: WrittenScheme, change: Change | None) -> Piece:
    stored = source.tensors[name]
    dtype = header_dtype(stored.dtype)
    read = partial(_read, name, stored, change)
    if name not in source.transposed:
        return Piece({name: Header(dtype, stored.shape)}, lambda: {name: read().to(dtype)})
    transposed, path = source.transposed[name], name.removesuffix(".weight")
    outs, ins = reversed(stored.shape) if transposed else stored.shape
    headers = {path + SCALE: Header(torch.float32, (outs, 1))}
    if scheme == "w8a8":
        headers[name] = Header(torch.int8, stored.shape)
    else:
        headers[path + PACKED] = Header(torch.int32, (outs, -(-ins // 4)))
        headers[path + SHAPE] = Header(torch.int64, (2,))

    def make() -> dict[str, Tensor]:
        rows = Int8(torch.empty(outs, ins, dtype=torch.int8), torch.empty(outs))
        quantize_into(read().T if transposed else read(), rows)
        made = {path + SCALE: rows.scale.unsqueeze(1)}
        if scheme == "w8a8":
            return made | {name: rows.values.T if transposed else rows.values}
        shape = torch.tensor([outs, ins])
        return made | {path + PACKED: packed(rows.values), path + SHAPE: shape}

    return Piece(headers, make)


def _read(name: str, stored: Stored, change: Change | None) -> Tensor:
    """Raises CheckpointError where it holds NaN or infinity, or `change` makes any."""
    tensor = stored.read()
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(f"{stored.file}: {name} has values that are not finite")
    return tensor if change is None else change(tensor)


def _copy_others(source: Source, target: Path) -> None:
    """Tokenizer, templates, generation config and whatever else lies there but weights; heads in files of their own."""
    heads = head_files(source.directory)
    for file in sorted(source.directory.rglob("*")):
        inside = file.relative_to(source.directory)
        hidden = any(part.startswith(".") for part in inside.parts)
        weights = file.name.endswith(WEIGHTS) and file not in heads
        if file.is_file() and not (hidden or weights or str(inside) == "config.json"):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / inside)
