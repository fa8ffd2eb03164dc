"""Where a checkpoint lies in another engine's format: in the cache, never beside the original."""

from __future__ import annotations

import hashlib
from pathlib import Path


def place(checkpoint: Path, kind: str) -> Path:
    """A path, not yet there when nothing was converted. Other files under the same name have another place."""
    digest = hashlib.sha256(str(checkpoint.resolve()).encode())
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    directory = Path("~/.cache/tandem/bench/converted").expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{checkpoint.name}-{digest.hexdigest()[:12]}-{kind}"
