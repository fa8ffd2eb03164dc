"""Run the tests area by area and print how long each took beside its budget on two cores.

`python tests/areas.py` runs all; `python tests/areas.py http core` some. Exit status: 0 when every area passed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

HADOLINT = BIN / "hadolint"  # its wheel is for x86-64 Linux
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=5"]
AREAS: dict[str, tuple[int, list[list[str]]]] = {  # name: (budget in seconds, commands)
    "rest": (
        240,
        [
            [str(BIN / "ruff"), "check", "."],
            [str(BIN / "ruff"), "format", "--check", "."],
            [str(BIN / "pyright")],
            *([[str(HADOLINT), "Dockerfile.cuda"]] if HADOLINT.exists() else []),
            [*PYTEST, "tests/test_structure.py", "tests/benchmarks"],
        ],
    ),
    "core": (300, [[*PYTEST, "tests/engine", "tests/model", "tests/text"]]),
    "kernels": (480, [[*PYTEST, "tests/kernels"]]),
    "http": (300, [[*PYTEST, "tests/api", "tests/process", "tests/clients", "--ignore=tests/api/rlhf"]]),
    "rlhf": (180, [[*PYTEST, "tests/api/rlhf", "tests/compat", "tests/examples"]]),
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in AREAS]
    if unknown:
        print(f"no such area: {', '.join(unknown)}; there are {', '.join(AREAS)}")
        return 2
    rows: list[tuple[str, float, int, bool]] = []
    for name in names or AREAS:
        budget, commands = AREAS[name]
        print(f"== {name}", flush=True)
        began = time.monotonic()
        passed = True
        for command in commands:
            print("$", " ".join(Path(part).name if part.startswith(str(BIN)) else part for part in command), flush=True)
            passed &= subprocess.run(command, cwd=ROOT).returncode == 0
        rows.append((name, time.monotonic() - began, budget, passed))
    print("\narea      seconds  budget")
    for name, seconds, budget, passed in rows:
        over = "" if seconds <= budget else "  over budget"
        print(f"{name:8} {seconds:8.0f} {budget:7}  {'passed' if passed else 'FAILED'}{over}")
    failed = sum(not row[3] for row in rows)
    print(f"areas: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
