"""What the figures were measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "vllm", "flash-attn")


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str | None:
    """The checkout's commit, with `+changed` where the tree differs from it; None outside git."""
    head = output_of("git", "rev-parse", "HEAD", cwd=root)
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return head and head + ("+changed" if changed else "")


def describe(device: str) -> dict[str, Any]:
    """Processor, memory and, for CUDA, the device as its driver names it. Needs no CUDA context of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    machine: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(fields["MemTotal"].split()[0]) / 2**20, 1),
        "device": device,
    }
    if device == "cuda":
        query = (
            "name",
            "driver_version",
            "memory.total",
            "clocks.sm",
            "clocks.max.sm",
            "power.limit",
            "temperature.gpu",
        )
        text = output_of("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader")
        values = (text or "").splitlines()[:1]
        machine["gpu"] = (
            dict(zip(query, (part.strip() for part in values[0].split(",")), strict=False)) if values else None
        )
        machine["gpus"] = len((text or "").splitlines())
    return machine
