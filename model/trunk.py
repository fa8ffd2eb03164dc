"""A value head on the decoder of another model: read from a file or a checkpoint, or copied from a reward model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from .checkpoint import LANGUAGE_HEAD, head_files, open_files, read_checkpoint, with_head
from .config import ModelConfig
from .errors import CheckpointError
from .fields import Fields
from .head_formats import FILES, find_head, no_head
from .heads import ScoreHead
from .load import naming_of
from .model import Model
from .registry import ARCHITECTURES
from .stored import Stored, digest
from .weights import Naming, fill

# Fields of a config that say nothing of the decoder.
AROUND = frozenset(
    {"architecture", "dtype", "labels", "end_ids", "tied", "pooling", "score", "values", "head_bias", "logit_softcap"}
    | {"scheme"}
)


def value_model(trunk: Model, path: str | Path | None) -> Model:
    """A value model whose decoder is `trunk`'s, the same tensors.

    `path`: a directory with a whole checkpoint, of which the head alone is read, or with just a file for the head;
    None: the head starts as a copy of the trunk's own, a reward model's. Raises CheckpointError.
    """
    if path is None:
        return _copied(trunk)
    directory = Path(path)
    config, files, tensors = _read(directory, trunk.config)
    head = ScoreHead(config.score, config.labels, config.output_size, trunk.place)
    fill(nn.Module(), head, Naming((), ".*"), tensors, directory, lambda done, total: None)
    return _sharing(trunk, config, f"{trunk.digest} {digest(files)}", head)


def _copied(trunk: Model) -> Model:
    if not isinstance(trunk.head, ScoreHead) or trunk.config.labels != 1:
        raise CheckpointError("the model it shares has no head with one score to start from: give the head's directory")
    return _sharing(trunk, replace(trunk.config, values=True), trunk.digest, deepcopy(trunk.head))


def _sharing(trunk: Model, config: ModelConfig, digest: str, head: ScoreHead) -> Model:
    model = trunk.sharing(config, digest, head)
    model.naming = naming_of(trunk.decoder, config, LANGUAGE_HEAD)
    return model


def _read(directory: Path, trunk: ModelConfig) -> tuple[ModelConfig, list[Path], list[tuple[str, Stored]]]:
    """The trunk's config with the head that the directory holds, the files, and their tensors."""
    if (directory / "config.json").is_file():
        checkpoint = read_checkpoint(directory, head="value")
        own, files = checkpoint.config, [directory / "config.json", *checkpoint.files]
        if difference := _difference(own, trunk):
            raise CheckpointError(f"{directory} cannot share a decoder with the model that trunk= names: {difference}")
        return replace(trunk, labels=1, values=True, pooling=None, score=own.score), files, checkpoint.tensors
    files = head_files(directory)
    if not files:
        raise CheckpointError(f"{directory} holds no head: neither config.json nor {' or '.join(FILES)}")
    tensors, silent = open_files(files), Fields(files[0], {})
    found = find_head(directory, silent, {name for name, _ in tensors})
    if found is None:
        raise no_head(directory, silent)
    return with_head(replace(trunk, labels=0), True, found, silent, dict(tensors)), files, tensors


def _difference(config: ModelConfig, trunk: ModelConfig) -> str | None:
    """In what their decoders differ."""
    if ARCHITECTURES[config.architecture].family is not ARCHITECTURES[trunk.architecture].family:
        return f"it is a {config.architecture}, not a {trunk.architecture}"
    config, trunk = _any_context(config), _any_context(trunk)
    for name in (field.name for field in fields(ModelConfig) if field.name not in AROUND):
        own, other = getattr(config, name), getattr(trunk, name)
        if own != other:
            return f"its {name} is {own}, not {other}"
    return None


def _any_context(config: ModelConfig) -> ModelConfig:
    """Without what depends on the context that it is served with: see `Rope.within`."""
    return config if config.rope is None else replace(config, rope=replace(config.rope, factors=()))
