"""Which hidden states of a text count for its embedding or its score: what is asked for, else what the checkpoint says.

For embeddings sentence-transformers lists the parts of a model in `modules.json`: the decoder, the pooling in a
directory with its own config.json, and Normalize where embeddings have length 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from .errors import CheckpointError
from .fields import Fields

PoolingMode = Literal["last", "mean", "cls"]  # of embeddings: the last row, the mean of all, the first
# Of scores: the last token, the last that is no padding, the first end token, the one before the first padding, the
# mean of all, the last token of a certain id.
ScorePoolingMode = Literal["last", "last_non_pad", "first_eos", "before_first_pad", "mean", "token_id"]

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


class ScorePooling(NamedTuple):
    """The hidden state of a text that its score is made of. `ids`: the tokens that the mode looks for."""

    mode: ScorePoolingMode = "last"
    ids: tuple[int, ...] = ()

    def position(self, token_ids: Sequence[int]) -> int | None:
        """The one position of a text that counts; None: all do. Raises LookupError if the token that marks it is not in
        the text. A text without end tokens or padding counts at its last token."""
        if self.mode == "mean":
            return None
        last = len(token_ids) - 1
        if self.mode == "last":
            return last
        marked = (place for place, token in enumerate(token_ids) if token in self.ids)
        if self.mode == "first_eos":
            return next(marked, last)
        plain = [place for place, token in enumerate(token_ids) if token not in self.ids]
        if self.mode == "last_non_pad":
            return plain[-1] if plain else 0  # as transformers
        if self.mode == "before_first_pad":  # padding in front is not the first: OPT's texts begin with such a token
            return next((place for place in marked if plain and place > plain[0]), last + 1) - 1
        places = list(marked)
        if not places:
            raise LookupError(f"the text has no token {self.ids[0]}, at which its score is read")
        return places[-1]


def score_pooling(mode: ScorePoolingMode, fields: Fields, end_ids: Iterable[int]) -> ScorePooling:
    """With the ids that config.json gives. Raises CheckpointError where it gives none that the mode needs."""
    if mode in ("last", "mean"):
        return ScorePooling(mode)
    name = {"first_eos": "eos_token_id", "token_id": "reward_token_id"}.get(mode, "pad_token_id")
    ids = tuple(end_ids) if mode == "first_eos" else token_ids_of(fields, name)
    if not ids:
        raise CheckpointError(f"{fields.path}: {name} is missing, but pooling={mode} looks for that token")
    return ScorePooling(mode, ids)


def token_ids_of(fields: Fields, name: str) -> tuple[int, ...]:
    """The id of a special token; none where it is left out, or negative, as old configs say that there is none."""
    given = fields.get(name)
    return () if type(given) is int and given < 0 else fields.token_ids(name)


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
