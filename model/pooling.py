"""How a text's hidden states become its embedding: what is asked for, else what the checkpoint says.

sentence-transformers lists the parts of a model in `modules.json`: the decoder, the pooling in a directory with its own
config.json, and Normalize where embeddings have length 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from .errors import CheckpointError
from .fields import Fields

PoolingMode = Literal["last", "mean", "cls"]  # the last row, the mean of all, the first

MODULES = "modules.json"
# What sentence-transformers calls them: as flags `pooling_mode_…`, and as values of `pooling_mode`.
MODES: dict[str, PoolingMode] = {
    "lasttoken": "last",
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
}


class Pooling(NamedTuple):
    mode: PoolingMode = "last"
    normalized: bool = True  # embeddings are divided by their length


def is_embedding_model(directory: Path) -> bool:
    """Whether sentence-transformers made the checkpoint, whatever head its decoder is said to have."""
    return (directory / MODULES).is_file()


def read_pooling(directory: Path, wanted: PoolingMode | None = None) -> Pooling:
    """The pooling of the checkpoint, with `wanted` instead of its mode. Raises CheckpointError for another module."""
    if not is_embedding_model(directory):
        return Pooling(wanted or "last")
    path, found, normalized = directory / MODULES, Pooling().mode, False
    for kind, place in _modules(path):
        if kind == "Pooling":
            found = _mode(Fields.read(directory / place / "config.json")) if wanted is None else wanted
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise CheckpointError(f"{path}: module {kind} is not supported: Transformer, Pooling and Normalize are")
    return Pooling(wanted or found, normalized)


def _modules(path: Path) -> list[tuple[str, str]]:
    """The class names of the modules, in order, and where each one's files lie."""
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8"))
        return [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in cast(list[dict[str, Any]], listed)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} must list modules with type and path: {error!r}") from error


def _mode(fields: Fields) -> PoolingMode:
    """The one mode that is switched on. Several would be concatenated, which is not done here."""
    given = fields.get("pooling_mode")
    if given is None:
        prefix = "pooling_mode_"
        names = [name for name, value in fields.values.items() if name.startswith(prefix) and value is True]
        if len(names) != 1 or names[0].removeprefix(prefix) not in MODES:
            listed = " and ".join(names) or "no pooling_mode_…"
            raise CheckpointError(
                f"{fields.path}: {listed} is true; supported: lasttoken, mean_tokens or cls_token alone"
            )
        return MODES[names[0].removeprefix(prefix)]
    if given not in MODES:
        raise fields.error("pooling_mode", "'lasttoken' or 'mean' or 'cls'")
    return MODES[given]
