"""Where a request may have weights read from: the directory of --weights-root and what lies in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..engine.commands import LoadAdapter, UpdateWeights
from .errors import invalid

ON_DISK = ("disk", "lora")  # sources of an update that are paths

AnyCommand = TypeVar("AnyCommand")


def confined(command: AnyCommand, root: str | None) -> AnyCommand:
    """The command, its path resolved where it has one. Raises ApiError: outside, or nothing is there."""
    if isinstance(command, LoadAdapter) or (isinstance(command, UpdateWeights) and command.source in ON_DISK):
        return replace(command, path=_resolved(command.path, root))
    return command


def _resolved(path: str, root: str | None) -> str:
    """With its links followed; a relative one begins at the root. Of a directory, the files in it are weights."""
    if root is None:
        raise invalid(f"path is {path!r}; no path is read: start the server with --weights-root DIR", "path")
    top = Path(root).resolve()
    try:
        found = (top / path).resolve()
        inside, there = found.is_relative_to(top), found.exists()
        files = sorted(found.iterdir()) if inside and found.is_dir() else [found]
    except (OSError, ValueError, RuntimeError) as error:
        raise invalid(f"path is {path!r}: {error}", "path") from None
    if not inside:
        raise invalid(f"path is {path!r}, outside --weights-root {top}", "path")
    if not there:
        raise invalid(f"path is {path!r}; there is nothing at {found}", "path")
    for file in files:
        _check_file(file, path, top)
    return str(found)


def _check_file(file: Path, path: str, top: Path) -> None:
    """A link in a directory of weights must not lead out, and what is read must have an end."""
    try:
        inside, special = file.resolve().is_relative_to(top), file.exists() and not (file.is_file() or file.is_dir())
    except (OSError, RuntimeError) as error:
        raise invalid(f"path is {path!r}: {error}", "path") from None
    if not inside:
        raise invalid(f"path is {path!r}; {file.name} in it is a link that leads outside --weights-root {top}", "path")
    if special:
        raise invalid(f"path is {path!r}; {file} is no regular file", "path")
