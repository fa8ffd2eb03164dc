"""A result as a file: on what it was measured, with what, by which command; then the figures."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..gpu import machine

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tandem", "fastapi", "starlette", "uvicorn", "sse-starlette", "pyzmq", "msgspec", "aiohttp")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Date, command, commit (`+changed` behind it where the tree differs, None outside git), machine and versions."""
    versions = machine.versions()
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": machine.commit(ROOT),
        "machine": machine.describe(device.partition(":")[0]),
        "versions": versions,
    }


def command() -> str:
    """How this process was started, without where its programs lie."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started_as_module = spec is not None
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if started_as_module else [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes the file, and the directories above it where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def append(path: Path, result: dict[str, Any]) -> None:
    """Adds one line to a history."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
