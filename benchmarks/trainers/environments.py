"""Where the trainers live: `.venvs/trl` and `.venvs/openrlhf`, made on first use.

torch and transformers are this environment's, so that nothing large is installed twice.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ..clients.environments import ROOT, STAMP, beside, is_made, say
from ..peers.setup import step

TRL_VENV, OPENRLHF = ROOT / ".venvs" / "trl", ROOT / ".venvs" / "openrlhf"
TRL = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2", "requests", "aiohttp")
OPENRLHF_WHEEL = "openrlhf==0.11.2"


def trl() -> Path:
    """The Python of an environment with TRL. Raises SetupError."""
    return beside(TRL_VENV, TRL)


def openrlhf() -> Path:
    """OpenRLHF's agent.py. Its package wants deepspeed, flash-attn and ray; this file of it wants aiohttp alone.

    Raises SetupError.
    """
    if not is_made(OPENRLHF, OPENRLHF_WHEEL):
        shutil.rmtree(OPENRLHF, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        options = ["--no-deps", "--target", str(OPENRLHF)]
        step(say, f"unpacking {OPENRLHF_WHEEL}", [*pip, *options, OPENRLHF_WHEEL])
        (OPENRLHF / STAMP).write_text(OPENRLHF_WHEEL)
    return OPENRLHF / "openrlhf" / "utils" / "agent.py"
