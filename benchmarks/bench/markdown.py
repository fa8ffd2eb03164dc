"""A result as a page of Markdown beside its JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def heading(found: dict[str, Any], title: str) -> str:
    """What was measured, where, when and by which command."""
    machine, versions = found["machine"], found["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "uvicorn", "starlette", "sse-starlette") if name in versions
    )
    return "\n".join(
        [
            f"# {title}",
            "",
            f"`{found['command']}`",
            "",
            f"{found['date']}, commit {found['commit']}, {machine.get('processor')} with {machine.get('cores')} cores, "
            f"{packages}.",
            "",
        ]
    )


def write(path: Path, found: dict[str, Any], title: str, body: str) -> None:
    """Writes `path` with .md behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(f"{heading(found, title)}\n{body}\n")
