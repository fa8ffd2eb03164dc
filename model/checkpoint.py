"""What a checkpoint directory holds, found out before a weight is read: the decoder, its head, the files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeGuard, get_args

from .compressed_tensors import joined
from .config import HeadKind, ModelConfig, read_config
from .errors import CheckpointError
from .fields import Fields
from .head_formats import FILES, FoundHead, find_head, no_head, read_head
from .pooling import PoolingMode, ScorePoolingMode
from .stored import Stored, find_files, open_file

AnyPooling = PoolingMode | ScorePoolingMode
LANGUAGE_HEAD = r"lm_head\.(weight|bias)|embed_out\.weight"  # what a model with another head leaves out


class Checkpoint(NamedTuple):
    """`tensors` by name, in the order of `files`; those whose name matches `ignored` are not for this model."""

    directory: Path
    config: ModelConfig
    files: list[Path]
    tensors: list[tuple[str, Stored]]
    ignored: str


def read_checkpoint(path: str | Path, *, head: HeadKind | None = None, pooling: AnyPooling | None = None) -> Checkpoint:
    """The checkpoint in directory `path`, to be served with a head of kind `head`; None: the one it has.

    A head that gives scores may be served as one that gives values and the other way round. A checkpoint whose class
    says what its head is keeps that where `head` is another one: see `config.kind`. `pooling`: instead of what the
    checkpoint says. Raises CheckpointError that names what is missing, ambiguous or not supported.
    """
    directory = Path(path)
    config = read_config(directory, embedding=head == "embed", pooling=pooling if _embeds(pooling) else None)
    fields = Fields.read(directory / "config.json")
    files = find_files(directory)
    tensors = open_files(files) if config.scheme == "none" else joined(open_files(files))
    if config.kind == "embed" and head in (None, "lm", "embed"):
        if pooling is not None and not _embeds(pooling):
            raise _wrong_pooling(pooling, "embeddings", PoolingMode)
        return Checkpoint(directory, config, files, tensors, LANGUAGE_HEAD)
    beside = head_files(directory)
    extra = open_files(beside)
    found = find_head(directory, fields, {name for name, _ in (*tensors, *extra)})
    kind = head if head in ("score", "value") else config.kind
    if kind == "lm" and head is None and found is not None:
        if found.format.beside:
            raise CheckpointError(
                f"{directory} has a language model's head and {found.layers[0]}: say which to serve, role=policy, "
                "role=reward or role=value"
            )
        kind = "score"
    if kind == "lm":
        ignored = "" if found is None else rf"{re.escape(found.format.key)}\..*"
        return Checkpoint(directory, config, files, tensors, ignored)
    if found is None:
        raise no_head(directory, fields)
    if pooling is not None and not _scores(pooling):
        raise _wrong_pooling(pooling, "scores", ScorePoolingMode)
    tensors += extra
    config = with_head(config, kind == "value", found, fields, dict(tensors), pooling)
    scale = found.format.normalizer
    ignored = LANGUAGE_HEAD if scale is None else rf"{LANGUAGE_HEAD}|{re.escape(scale)}(mean|var|count)"
    return Checkpoint(directory, config, [*files, *beside], tensors, ignored)


def with_head(
    config: ModelConfig,
    values: bool,
    found: FoundHead,
    fields: Fields,
    tensors: dict[str, Stored],
    pooling: ScorePoolingMode | None = None,
) -> ModelConfig:
    """A decoder's config with the head that was found, read as a value head or for scores."""
    labels = config.labels if found.format.counted and config.labels else 1
    if values and labels != 1:
        raise CheckpointError(f"{fields.path.parent}: {found.layers[0]} has {labels} outputs, and a value is one")
    score = read_head(fields, found, tensors, config.end_ids, pooling)
    return replace(config, labels=labels, values=values, pooling=None, score=score)


def head_files(directory: Path) -> list[Path]:
    """The file that holds a head and nothing else, if there is one."""
    return [directory / name for name in FILES if (directory / name).is_file()][:1]


def open_files(files: list[Path]) -> list[tuple[str, Stored]]:
    return [named for file in files for named in open_file(file).items()]


def _embeds(pooling: AnyPooling | None) -> TypeGuard[PoolingMode]:
    return pooling in get_args(PoolingMode)


def _scores(pooling: AnyPooling) -> TypeGuard[ScorePoolingMode]:
    return pooling in get_args(ScorePoolingMode)


def _wrong_pooling(pooling: AnyPooling, what: str, allowed: object) -> CheckpointError:
    return CheckpointError(f"pooling={pooling} is not for {what}: one of {', '.join(get_args(allowed))}")
