"""Where the trainers live: `.venvs/trl`, `.venvs/openrlhf` and `.venvs/areal`, made on first use.

torch and transformers are this environment's, so that nothing large is installed twice.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ..clients.environments import ROOT, STAMP, beside, is_made, say
from ..peers.setup import step

TRL_VENV = ROOT / ".venvs" / "trl"
TRL = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2", "requests", "aiohttp")
OPENRLHF, AREAL = "openrlhf==0.11.2", "areal==1.0.4"


def trl() -> Path:
    """The Python of an environment with TRL. Raises SetupError."""
    return beside(TRL_VENV, TRL)


def unpacked(package: str) -> Path:
    """A directory with the package alone: what it wants besides is not needed for the files that are used of it.

    Raises SetupError.
    """
    place = ROOT / ".venvs" / package.partition("==")[0]
    if not is_made(place, package):
        shutil.rmtree(place, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        step(say, f"unpacking {package}", [*pip, "--no-deps", "--target", str(place), package])
        (place / STAMP).write_text(package)
    return place
