"""Checkpoints whose matrices are in int8 already, as llm-compressor and `tandem quantize` write them.

In the place of `NAME.weight` [O, D], O outputs and D inputs, compressed-tensors has by its format

* `int-quantized` and `naive-quantized`: `NAME.weight` int8, shaped as ever, and `NAME.weight_scale` [O, 1], [O] or [1];
* `pack-quantized`: `NAME.weight_packed` [O, D / 4] int32, `NAME.weight_scale` and `NAME.weight_shape` [2]. An int32
  holds four neighbours of a row, each 128 larger, the first in the lowest bits.

Which matrices are quantized the tensors say, and config.json in what way.
"""

# torch leaves the type of Tensor.tolist open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from .errors import CheckpointError
from .fields import Fields
from .quantization import SchemeName
from .stored import Int8Rows, Stored

FORMATS = ("int-quantized", "naive-quantized", "pack-quantized")
SCALE, PACKED, SHAPE = ".weight_scale", ".weight_packed", ".weight_shape"
INSTEAD = "'compressed-tensors' with int8 matrices; or serve the checkpoint it was made from, with quantization=int8"
# What is said of numbers in int8: the first value where nothing is.
EIGHT_BITS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"num_bits": (8,), "type": ("int",), "symmetric": (True,), "group_size": (None, -1), "actorder": (None,)}
)


def read_scheme(fields: Fields) -> SchemeName:
    """What a config.json says of its checkpoint's matrices. Raises CheckpointError for what is not supported here."""
    if fields.get("quantization_config") is None:
        return "none"
    said = fields.object("quantization_config")
    if said.get("quant_method") != "compressed-tensors":
        raise said.error("quant_method", INSTEAD)
    said.only("kv_cache_scheme")
    said.only("transform_config")
    said.only("sparsity_config", {})
    groups = said.object("config_groups")
    found: set[SchemeName] = {_scheme_of(groups.object(name), said) for name in groups.values}
    if len(found) != 1:
        raise said.error("config_groups", "groups that are all quantized in one way, and at least one of them")
    return found.pop()


def _scheme_of(group: Fields, said: Fields) -> SchemeName:
    (group if group.get("format") is not None else said).choice("format", allowed=FORMATS, default="")
    group.only("output_activations")
    weights = _eight_bits(group, "weights")
    if weights.get("strategy", "channel") not in ("channel", "tensor"):
        raise weights.error("strategy", "'channel' or 'tensor'")
    weights.only("dynamic", False)
    if group.get("input_activations") is None:
        return "int8"
    rows = _eight_bits(group, "input_activations")
    if rows.get("strategy") != "token" or rows.get("dynamic") is not True:
        raise rows.error("strategy" if rows.get("strategy") != "token" else "dynamic", "'token' that is dynamic")
    return "w8a8"


def _eight_bits(group: Fields, name: str) -> Fields:
    if group.get(name) is None:
        raise group.error(name, "8 bits")
    said = group.object(name)
    for field, allowed in EIGHT_BITS.items():
        if said.get(field, allowed[0]) not in allowed:
            raise said.error(field, " or ".join(json.dumps(one) for one in allowed))
    return said


def joined(tensors: Iterable[tuple[str, Stored]]) -> list[tuple[str, Stored]]:
    """The tensors with each int8 matrix as one of them, called NAME.weight; all others as they are.

    Raises CheckpointError for one that is not whole.
    """
    found = dict(tensors)
    for name in [name for name in found if name.endswith(SCALE)]:
        matrix, scale = name.removesuffix(SCALE), found.pop(name)
        packed, shape = found.pop(matrix + PACKED, None), found.pop(matrix + SHAPE, None)
        whole = found.get(f"{matrix}.weight") if packed is None else _unpacked(matrix, packed, shape)
        if whole is None or whole.dtype != "I8":
            raise CheckpointError(
                f"{scale.file} has {name} without a matrix in int8, {matrix}.weight or {matrix}{PACKED}"
            )
        rows = Int8Rows(partial(_scales, name, scale), as_outputs=packed is not None)
        found[f"{matrix}.weight"] = whole._replace(int8=rows)
    return list(found.items())


def _unpacked(matrix: str, packed: Stored, shape: Stored | None) -> Stored:
    """A matrix of which the four bytes of an int32 are values."""
    if shape is None or math.prod(shape.shape) != 2:
        raise CheckpointError(f"{packed.file} has {matrix}{PACKED} without {matrix}{SHAPE}, two numbers")
    outs, ins = (int(length) for length in cast("list[Any]", shape.read().tolist()))
    if packed.shape != (outs, -(-ins // 4)) or packed.dtype != "I32":
        given = f"{matrix}{PACKED} is {packed.dtype} {list(packed.shape)} for a matrix {[outs, ins]}"
        raise CheckpointError(f"{packed.file}: {given}; supported: four values of 8 bits to an int32")

    def read() -> Tensor:
        return (packed.read().contiguous().view(torch.uint8)[:, :ins] ^ 128).view(torch.int8)

    return Stored(packed.file, (outs, ins), "I8", read)


def _scales(name: str, scale: Stored, outs: int) -> Tensor:
    """[outs] float32."""
    if math.prod(scale.shape) not in (1, outs):
        raise CheckpointError(f"{scale.file}: {name} is {list(scale.shape)}, must be one number or {outs}")
    found = scale.read().float().flatten()
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise CheckpointError(f"{scale.file}: {name} has values that are no scales: negative or not finite")
    return found.expand(outs)
