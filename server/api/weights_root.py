"""Where a request may have weights read from: the directory of --weights-root and what lies in it."""

from __future__ import annotations

from pathlib import Path

from .errors import invalid
from .options import ApiOptions


def path_in_root(options: ApiOptions, path: str, param: str) -> str:
    """The path with its links followed; a relative one begins at the root. Raises ApiError: outside, or not there."""
    if options.weights_root is None:
        raise invalid(f"{param} is {path!r}; no path is read: start the server with --weights-root DIR", param)
    root = Path(options.weights_root).resolve()
    try:
        found = (root / path).resolve()
        inside, there = found.is_relative_to(root), found.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise invalid(f"{param} is {path!r}: {error}", param) from None
    if not inside:
        raise invalid(f"{param} is {path!r}, outside --weights-root {root}", param)
    if not there:
        raise invalid(f"{param} is {path!r}; there is nothing at {found}", param)
    return str(found)
