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
    """With its links followed; a relative one begins at the root."""
    if root is None:
        raise invalid(f"path is {path!r}; no path is read: start the server with --weights-root DIR", "path")
    top = Path(root).resolve()
    try:
        found = (top / path).resolve()
        inside, there = found.is_relative_to(top), found.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise invalid(f"path is {path!r}: {error}", "path") from None
    if not inside:
        raise invalid(f"path is {path!r}, outside --weights-root {top}", "path")
    if not there:
        raise invalid(f"path is {path!r}; there is nothing at {found}", "path")
    return str(found)
