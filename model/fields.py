"""Reading the JSON files of a checkpoint field by field, refusing by name what cannot be taken as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from .errors import CheckpointError

TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # what configs call `ops.gelu_tanh`


class Fields:
    """The fields of one JSON object. A value that is not as it must be raises CheckpointError with field and value.

    null counts as missing. Several names of one field are aliases, the first given one counts.
    """

    def __init__(self, path: Path, values: dict[str, Any], inside: str = "") -> None:
        self.path, self.values, self.inside = path, values, inside

    @staticmethod
    def read(path: Path) -> Fields:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return Fields(path, cast(dict[str, Any], values))

    def error(self, name: str, supported: str) -> CheckpointError:
        given = f"is {json.dumps(self.values[name])}" if name in self.values else "is missing"
        return CheckpointError(f"{self.path}: {self.inside}{name} {given}; supported: {supported}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        name = self._given(names)
        value = self.get(name, default)
        if type(value) is not int or value < least:
            raise self.error(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number")
        return float(value)

    def number_or_none(self, name: str, default: float | None) -> float | None:
        """For fields of which null says that there is none, which is not what leaving them out says."""
        null = name in self.values and self.values[name] is None
        return None if null or (default is None and name not in self.values) else self.number(name, default)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        value = self.get(name)
        items = cast(list[Any], value) if isinstance(value, list) else []
        if len(items) != count or any(isinstance(one, bool) or not isinstance(one, int | float) for one in items):
            raise self.error(name, f"a list of {count} numbers")
        return tuple(float(one) for one in items)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, *names: str, allowed: tuple[str, ...], default: str) -> str:
        name = self._given(names)
        value = self.get(name, default)
        if value not in allowed:
            raise self.error(name, " or ".join(map(repr, allowed)))
        return value

    def only(self, name: str, *allowed: object) -> None:
        """The field is missing or one of `allowed`: any other value would ask for what is not computed here."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise self.error(name, " or ".join(json.dumps(one) for one in allowed) or "leaving it out")

    def strings(self, name: str) -> list[str] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in cast(list[Any], value)):
            raise self.error(name, "a list of strings")
        return cast(list[str], value)

    def object(self, *names: str) -> Fields:
        """The fields of a nested object, none where it is missing."""
        name = self._given(names)
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(self.path, cast(dict[str, Any], value), f"{self.inside}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them, as a tuple."""
        value = self.get(name, [])
        ids = cast(list[Any], value) if isinstance(value, list) else [value]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise self.error(name, "a token id or a list of token ids")
        return tuple(cast(list[int], ids))

    def _given(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self.values.get(name) is not None), names[0])
