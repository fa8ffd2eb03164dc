"""What `--model` may say, turned into a checkpoint that an engine can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...server.engine.options import ModelSpec
from ...server.engine.request import Role
from ...server.options import bundled_models

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...server.text.text import Text

NULL = "null"
RANDOM = "random:"


class UsageError(ValueError):
    """What the user asked for cannot be measured. The message is one sentence: what is wrong and what would do."""


def is_null(word: str) -> bool:
    """`null`, or `null:MS` with the milliseconds that a step sleeps."""
    return word.partition(":")[0] == NULL


def path_of(word: str, role: Role = "policy") -> str:
    """The checkpoint's directory, or `null`. Raises UsageError.

    `demo` is the bundled model of that role, `null` an engine whose step is free, `random:125m` a checkpoint of random
    weights that is written once; anything else is a directory.
    """
    if is_null(word):
        return word
    if word == "demo":
        return next(spec.path for spec in bundled_models() if spec.role == role)
    if word.startswith(RANDOM):
        from ..peers.checkpoint import checkpoint

        try:
            return str(checkpoint(word))
        except (KeyError, ValueError) as error:
            raise UsageError(f"--model {word}: {error.args[0] if error.args else error}") from None
    if not (Path(word) / "config.json").is_file():
        raise UsageError(
            f"--model {word}: no such directory with a config.json; give a Hugging Face checkpoint, demo, null or "
            f"{RANDOM}125m"
        )
    return str(Path(word).resolve())


def spec_of(word: str, name: str, role: Role = "policy", **given: object) -> ModelSpec:
    """The model as an engine is told of it. Raises UsageError."""
    return ModelSpec(name, path_of(word, role), role, **given)  # type: ignore[arg-type]


def text_of(path: str) -> Text:
    """Tokenizer and chat template of a checkpoint. Raises UsageError where it has none."""
    from ...server.text.errors import TextError
    from ...server.text.text import Text

    try:
        return Text.load(path)
    except TextError as error:
        raise UsageError(f"this data set needs the model's tokenizer: {error}") from None


def tokenizer_of(path: str) -> Tokenizer:
    """Raises UsageError where the checkpoint has none."""
    from ...server.text.errors import TextError
    from ...server.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(Path(path)).tokenizer
    except TextError as error:
        raise UsageError(f"this data set needs the model's tokenizer: {error}") from None
